#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    arguments: DeployArguments,
}

fn parse(line: &str) -> Result<DeployArguments, clap::Error> {
    Line::try_parse_from(format!("deploy {line}").split(' ')).map(|line| line.arguments)
}

fn specification(line: &str) -> Result<Specification, Failure> {
    let arguments = parse(line).map_err(|error| Failure::argument(error.to_string()))?;
    arguments.specification()
}

#[test]
fn an_image_and_a_peer_are_enough() {
    let made = specification("web:1 --peer bob").unwrap();
    assert_eq!(made, Specification::plain("web".parse().unwrap(), "web:1"));
}

#[test]
fn every_flag_reaches_the_specification() {
    let line = "web.tar -p bob -n site -e A=1 -e B=x=y --cpu 1.5 -m 1g --pids 50 --files 256 --scratch 16m --expose 8080 \
        --restart on-failure:3 --entrypoint /bin/app --health-path /ready --health-interval 5s --health-retries 2 \
        --stop-timeout 1m --user root --cap chown,CAP_SETUID --writable /data=16m --writable-root 1g --require-userns --runtime runsc \
        --egress example.org:443 --egress 192.0.2.1:53 --network back serve --port 8080";
    let made = specification(&line.split_whitespace().collect::<Vec<_>>().join(" ")).unwrap();
    let expected = Specification {
        entrypoint: Some(vec!["/bin/app".into()]),
        command: ["serve", "--port", "8080"].map(str::to_owned).to_vec(),
        environment: vec!["A=1".parse().unwrap(), "B=x=y".parse().unwrap()],
        expose: Some(Port::new(8080).unwrap()),
        publish: true,
        limits: Limits {
            cpu: Millicores::new(1500).unwrap(),
            memory: ByteSize::mebibytes(1024),
            pids: 50,
            files: 256,
            scratch: ByteSize::mebibytes(16),
        },
        restart: RestartPolicy::OnFailure(Some(3)),
        health: Some(HealthCheck { path: "/ready".into(), interval_seconds: 5, retries: 2 }),
        stop_timeout_seconds: 60,
        capabilities: [Capability::Chown, Capability::Setuid].into(),
        user: User::Root,
        writable: vec!["/data=16m".parse().unwrap()],
        writable_root: Some(ByteSize::mebibytes(1024)),
        demands: Demands { user_namespace: true, runtime: Some("runsc".parse().unwrap()) },
        egress: "192.0.2.1:53,example.org:443".parse().unwrap(),
        network: Some("back".parse().unwrap()),
        ..Specification::plain("site".parse().unwrap(), "web.tar")
    };
    assert_eq!(made, expected);
}

#[test]
fn exposing_publishes_unless_told_otherwise() {
    assert!(!specification("web --peer bob --expose 80 --no-publish").unwrap().publish);
    assert!(specification("web --peer bob --no-publish").unwrap_err().to_string().contains("--expose"));
}

#[test]
fn scratch_shrinks_with_the_memory() {
    assert_eq!(specification("web --peer bob -m 32m").unwrap().limits.scratch, ByteSize::mebibytes(16));
}

#[test]
fn bad_input_names_the_field_and_has_a_code() {
    for (flags, field) in [
        ("--expose 0", "--expose"),
        ("--expose 70000", "--expose"),
        ("--expose -80", "--expose"),
        ("--expose 80/tcp", "--expose"),
        ("--egress localhost:80", "--egress"),
        ("--egress internet,a.b:1", "--egress"),
        ("--network -x", "--network"),
        ("--cpu 0", "--cpu"),
        ("--cpu -1", "--cpu"),
        ("--cpu 99999999", "--cpu"),
        ("--cpu 0.001", "cpu"),
        ("--memory 0", "--memory"),
        ("--memory -5m", "--memory"),
        ("--memory 99999999999999999999", "--memory"),
        ("--memory 1m", "memory"),
        ("--pids 0", "pids"),
        ("--pids -1", "--pids"),
        ("--pids 4294967296", "--pids"),
        ("--files 1", "files"),
        ("--files 99999999", "files"),
        ("--scratch 0", "--scratch"),
        ("--scratch 1g", "scratch"),
        ("-e FOO", "environment 'FOO' has no '='"),
        ("-e =x", "--env"),
        ("-e 1A=x", "environment name"),
        ("--env-file /nonexistent/file", "environment file"),
        ("--name Web", "--name"),
        ("--restart sometimes", "--restart"),
        ("--health-path /ready", "--expose"),
        ("--expose 80 --health-path ready", "health check path"),
        ("--expose 80 --health-path /r --health-retries 0", "retries"),
        ("--stop-timeout 1h", "stop timeout"),
        ("--timeout 0", "--timeout"),
    ] {
        let failure = specification(&format!("web --peer bob {flags}")).unwrap_err();
        let Failure::Problem(problem) = failure else { panic!("{flags}: {failure:?}") };
        assert!(problem.message.contains(field), "{flags}: {problem}");
        let code = if flags.starts_with("--env-file") { Code::FileFailed } else { Code::InvalidArgument };
        assert_eq!(problem.code, code, "{flags}");
    }
}

#[test]
fn images_without_a_possible_name_ask_for_one() {
    assert!(specification("./語.tar --peer bob").unwrap_err().to_string().contains("--name"));
    assert!(specification("./語.tar --peer bob --name web").is_ok());
}
