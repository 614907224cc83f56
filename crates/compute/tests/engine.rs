//! The isolation profile and the engine's side of images, against a real Docker Engine. A machine without one fails
//! these tests: that is meant.

#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "other tests use the rest")]
mod fixture;
mod registry;

use std::{collections::HashSet, io::Read as _, time::Duration};

use fixture::{Fixture, busybox, busybox_tar};
use futures::{StreamExt, TryStreamExt};
use peer_compute::{
    connector::{ConnectError, Connector},
    engine::{Engine, EngineError, LogOptions},
    guest_program::GuestProgram,
    image::{
        archive::{Archive, Selection},
        assemble::{LayerSource, assemble},
        configuration, missing,
    },
    inspect::differences,
    logflood::{FloodWatch, LogFile},
    profile, usage,
};
use peer_proto::{
    deploy::Limits,
    id::Digest,
    query::Output,
    unit::{ByteSize, Port},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use xtask::image::{Builder, Layer};

const MINUTE: Duration = Duration::from_mins(1);

#[tokio::test]
async fn the_engine_is_above_the_floor() {
    let facts = fixture::engine().facts().await.unwrap();
    assert!(facts.seccomp && facts.cpus > 0 && facts.memory > 0, "{facts:?}");
    assert!(["amd64", "arm64"].contains(&facts.architecture.as_str()), "{facts:?}");
}

/// The guest prints what it is; one container answers all of these questions.
const LOOK: &str = "grep -E '^(Cap|NoNewPrivs|Seccomp:|Uid|Gid|Groups)' /proc/self/status
echo devices $(ls /dev)
echo processes $(ls /proc | grep -c '^[0-9]')
echo interfaces $(ls /sys/class/net)
echo hostname $(hostname)
for path in /x /etc/x /proc/sys/kernel/hostname /sys/fs/cgroup/x /dev/x; do
  (echo 1 > $path) 2>/dev/null && echo wrote $path
done
cat /proc/keys /proc/timer_list 2>/dev/null | head -c 10 | grep -q . && echo read masked
mount -t tmpfs x /tmp 2>/dev/null && echo mounted
mknod /tmp/sda b 8 0 2>/dev/null && echo made a device
chroot / true 2>/dev/null && echo chrooted
grep -vE ' (overlay|proc|tmpfs|devpts|sysfs|cgroup|cgroup2|mqueue) ' /proc/mounts | sed 's/^/mount /'
cp /bin/busybox /tmp/b && /tmp/b true 2>/dev/null && echo executed from tmp
for file in /data/x /tmp/x /run/x; do echo 1 > $file && echo writable $file; done
ls -la /var/run/docker.sock /run/docker.sock 2>/dev/null && echo engine
true";

#[tokio::test]
async fn v4_i1_i2_container_has_no_capability_no_device_and_nothing_of_the_host() {
    let image = busybox().volume("/data").user("0:0").healthcheck(&["/bin/sh", "-c", "echo healthcheck ran"]);
    let image = image.label(profile::OWNER_LABEL, "stolen");
    let fixture = Fixture::load(image).await;
    let container = fixture.create(&["/bin/sh", "-c", LOOK], Limits::default()).await;
    container.assert_as_planned().await;
    let facts = container.facts().await;
    assert_ne!(facts.labels[profile::OWNER_LABEL], "stolen", "labels of the image win nothing");
    container.start().await;
    container.assert_as_planned().await;
    assert_eq!(container.wait().await, 0);
    let text = container.log().await;
    let has = |line: &str| text.lines().any(|each| each == line);
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(has(&format!("{name}:\t0000000000000000")), "{text}");
    }
    assert!(has("NoNewPrivs:\t1") && has("Seccomp:\t2"), "{text}");
    let uid = container.uid;
    assert!(
        has(&format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}")) && has(&format!("Gid:\t{uid}\t{uid}\t{uid}\t{uid}")),
        "{text}"
    );
    assert!(has("devices fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"), "{text}");
    assert!(has("interfaces lo"), "{text}");
    for file in ["/data/x", "/tmp/x", "/run/x"] {
        assert!(has(&format!("writable {file}")), "{text}");
    }
    let processes = text.lines().find_map(|line| line.strip_prefix("processes ")).unwrap();
    assert!(processes.parse::<u32>().unwrap() < 10, "{text}");
    for forbidden in ["wrote", "read masked", "mounted", "made", "chrooted", "executed", "healthcheck", "engine"] {
        assert!(!text.lines().any(|line| line.starts_with(forbidden)), "{forbidden}: {text}");
    }
    // Only the three files that the engine writes for name resolution; it owns them, and they are read-only.
    for line in text.lines().filter_map(|line| line.strip_prefix("mount ")) {
        let fields: Vec<_> = line.split(' ').collect();
        let own =
            ["/etc/resolv.conf", "/etc/hostname", "/etc/hosts", "/sbin/docker-init", "/dev/init"].contains(&fields[1]);
        assert!(own && fields[3].split(',').any(|option| option == "ro"), "{line}");
    }
    container.remove().await;
    fixture.remove().await;
}

#[tokio::test]
async fn v4n_nothing_is_reachable_from_inside_and_only_the_port_from_outside() {
    let host = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = host.local_addr().unwrap().port();
    let fixture = Fixture::load(busybox()).await;
    let script = format!(
        "for a in 127.0.0.1:{port} 172.17.0.1:{port} 169.254.169.254:80 198.51.100.2:80 10.0.0.1:80; do
           nc -w 2 ${{a%:*}} ${{a#*:}} </dev/null >/dev/null 2>&1 && echo reached $a
         done
         echo tried; exec nc -ll -p 8080 -e /bin/echo hello"
    );
    let container = fixture.create(&["/bin/sh", "-c", &script], Limits::default()).await;
    container.start().await;
    let connector = Connector::new(4);
    let namespace = connector.open(&fixture.engine, &container.id).await.unwrap();
    let mut answer = String::new();
    for _ in 0..100 {
        match namespace.connect(Port::new(8080).unwrap(), Duration::from_secs(5)).await {
            Ok(mut stream) => {
                stream.read_to_string(&mut answer).await.unwrap();
                break;
            }
            Err(ConnectError::Closed { .. }) => tokio::time::sleep(Duration::from_millis(100)).await,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(answer, "hello\n");
    // The provider's own loopback has a listener on this port; the container's has none.
    let refused = namespace.connect(Port::new(port).unwrap(), Duration::from_secs(5)).await;
    assert!(matches!(refused, Err(ConnectError::Closed { .. })), "{refused:?}");
    assert_eq!(container.log().await, "tried\n");
    container.remove().await;
    let gone = connector.open(&fixture.engine, &container.id).await;
    assert!(matches!(gone, Err(ConnectError::NotRunning)), "{gone:?}");
    let closed = namespace.connect(Port::new(8080).unwrap(), Duration::from_secs(5)).await;
    assert!(matches!(closed, Err(ConnectError::Closed { .. })), "{closed:?}");
    fixture.remove().await;
}

#[tokio::test]
async fn many_connections_at_once_arrive() {
    let fixture = Fixture::load(busybox()).await;
    let container = fixture.create(&["/bin/nc", "-ll", "-p", "8080", "-e", "/bin/cat"], Limits::default()).await;
    container.start().await;
    let namespace = Connector::new(4).open(&fixture.engine, &container.id).await.unwrap();
    let port = Port::new(8080).unwrap();
    while matches!(namespace.connect(port, MINUTE).await, Err(ConnectError::Closed { .. })) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let each = |n: u32| {
        let namespace = namespace.clone();
        async move {
            let mut stream = namespace.connect(port, MINUTE).await.unwrap();
            stream.write_u32(n).await.unwrap();
            assert_eq!(stream.read_u32().await.unwrap(), n);
        }
    };
    futures::future::join_all((0..40).map(each)).await;
    container.remove().await;
    fixture.remove().await;
}

fn small() -> Limits {
    Limits { memory: ByteSize::mebibytes(32), scratch: ByteSize::mebibytes(8), pids: 20, ..Limits::default() }
}

#[tokio::test]
async fn v5_memory_hog_is_killed_and_a_full_disk_stays_small() {
    let fixture = Fixture::load(busybox()).await;
    let fill = "dd if=/dev/zero of=/tmp/x bs=64k 2>/dev/null; echo filled $(($(wc -c < /tmp/x) / 1048576)); exec tail /dev/zero";
    let container = fixture.create(&["/bin/sh", "-c", fill], small()).await;
    container.start().await;
    assert_eq!(container.wait().await, 137);
    assert_eq!(container.log().await, "filled 8\n");
    container.remove().await;
    fixture.remove().await;
}

#[tokio::test]
async fn v5_fork_bomb_stays_inside_and_usage_is_measured() {
    let fixture = Fixture::load(busybox()).await;
    let bomb = "while :; do sleep 600 & done 2>/dev/null";
    let script = format!("({bomb}) & while :; do sleep 600; done");
    let container = fixture.create(&["/bin/sh", "-c", &script], small()).await;
    container.start().await;
    let pid = container.facts().await.pid.unwrap();
    let mut measured = None;
    for _ in 0..50 {
        let usage = usage::measure(pid, &container.id, &small(), Duration::from_millis(200)).await.unwrap();
        assert!(usage.pids <= 20, "{usage:?}");
        if usage.pids >= 18 {
            measured = Some(usage);
            break;
        }
    }
    let usage = measured.unwrap();
    // The engine's own figures, for a daemon that sees no file of the host's.
    let by_engine = fixture.engine.usage_by_engine(&container.id, &small()).await.unwrap();
    assert!(by_engine.pids <= 20 && by_engine.cpu_microseconds >= usage.cpu_microseconds, "{by_engine:?} {usage:?}");
    assert!(by_engine.memory_bytes > 0 && by_engine.memory_bytes <= 32 << 20, "{by_engine:?}");
    assert!(usage.cpu_microseconds > 0 && usage.memory_bytes > 0 && usage.memory_bytes <= 32 << 20, "{usage:?}");
    container.remove().await;
    let gone = usage::measure(pid, &container.id, &small(), Duration::ZERO).await;
    assert!(gone.is_err());
    fixture.remove().await;
}

#[tokio::test]
async fn v5_log_flood_is_found_and_its_file_stays_small() {
    let fixture = Fixture::load(busybox()).await;
    let container = fixture.create(&["/bin/yes"], Limits::default()).await;
    container.start().await;
    let path = container.facts().await.log_path.unwrap();
    let (mut watch, pause) = (FloodWatch::default(), Duration::from_millis(200));
    let mut found = false;
    for _ in 0..100 {
        tokio::time::sleep(pause).await;
        let file = LogFile::read(&path).unwrap();
        assert!(file.size < 4 << 20, "{file:?}");
        found = watch.sample(file, pause);
        if found {
            break;
        }
    }
    assert!(found);
    fixture.engine.kill(&container.id).await.unwrap();
    assert_eq!(container.wait().await, 137);
    container.remove().await;
    fixture.remove().await;
}

#[tokio::test]
async fn logs_keep_order_and_output_and_end_with_the_container() {
    let fixture = Fixture::load(busybox()).await;
    let script = "echo one; sleep 0.3; echo two >&2; sleep 0.3; echo three; printf end";
    let container = fixture.create(&["/bin/sh", "-c", script], Limits::default()).await;
    container.start().await;
    let follow = LogOptions { follow: true, ..LogOptions::default() };
    let followed: Vec<_> = fixture.engine.logs(&container.id, &follow).try_collect().await.unwrap();
    let texts: Vec<_> = followed.iter().map(|line| (line.output, line.text.as_str())).collect();
    let expected =
        [(Output::Stdout, "one\n"), (Output::Stderr, "two\n"), (Output::Stdout, "three\n"), (Output::Stdout, "end")];
    assert_eq!(
        texts.iter().map(|(o, t)| (*o, t.trim_end())).collect::<Vec<_>>(),
        expected.map(|(o, t)| (o, t.trim_end()))
    );
    let read = async |options: LogOptions| -> Vec<String> {
        let lines = fixture.engine.logs(&container.id, &options).map_ok(|line| line.text.trim_end().to_owned());
        lines.try_collect().await.unwrap()
    };
    assert_eq!(read(LogOptions { tail: Some(2), ..LogOptions::default() }).await, ["three", "end"]);
    assert_eq!(read(LogOptions { tail: Some(0), ..LogOptions::default() }).await, Vec::<String>::new());
    // Within the same second: the engine's own filter would let 'one' through.
    let since = Some(followed[1].at);
    assert_eq!(read(LogOptions { since, ..LogOptions::default() }).await, ["two", "three", "end"]);
    assert_eq!(container.wait().await, 0);
    container.remove().await;
    let mut gone = fixture.engine.logs(&container.id, &follow);
    assert!(matches!(gone.next().await, Some(Err(EngineError::NoSuchContainer { .. }))));
    assert!(gone.next().await.is_none());
    fixture.remove().await;
}

#[tokio::test]
async fn a_container_is_made_once_stopped_and_removed_any_number_of_times() {
    let fixture = Fixture::load(busybox()).await;
    let container = fixture.create(&["/bin/sleep", "600"], Limits::default()).await;
    let again = fixture.engine.create_planned(&container.plan).await;
    assert!(matches!(again, Err(EngineError::AlreadyExists { .. })), "{again:?}");
    assert!(container.facts().await.created);
    container.start().await;
    fixture.engine.start(&container.id).await.unwrap();
    assert_eq!(fixture.engine.wait(&container.id, Duration::from_millis(50)).await.unwrap(), None);
    let listed = fixture.engine.list(&fixture.node).await.unwrap();
    assert_eq!(listed.iter().map(|each| (&each.id, each.running)).collect::<Vec<_>>(), [(&container.id, true)]);
    assert!(fixture.engine.list("another node").await.unwrap().is_empty());
    let in_use = fixture.engine.remove_image(fixture.image).await;
    assert!(matches!(in_use, Err(EngineError::InUse { .. })), "{in_use:?}");
    for _ in 0..2 {
        fixture.engine.stop(&container.id, Duration::from_secs(5)).await.unwrap();
        fixture.engine.kill(&container.id).await.unwrap();
    }
    let facts = container.facts().await;
    assert!(!facts.running && facts.exit_code == Some(143), "{facts:?}");
    for _ in 0..2 {
        fixture.engine.remove(&container.id).await.unwrap();
    }
    assert_eq!(fixture.engine.inspect(&container.plan.name()).await.unwrap(), None);
    let gone = fixture.engine.start(&container.id).await;
    assert!(matches!(gone, Err(EngineError::NoSuchContainer { .. })), "{gone:?}");
    fixture.remove().await;
    let absent = fixture.engine.create_planned(&container.plan).await;
    assert!(matches!(absent, Err(EngineError::NoSuchImage { .. })), "{absent:?}");
}

#[tokio::test]
async fn i1_i2_a_foreign_container_is_never_taken_for_ours() {
    let fixture = Fixture::load(busybox()).await;
    let container = fixture.create(&["/bin/true"], Limits::default()).await;
    let other = fixture.plan(&["/bin/true"], Limits { pids: 99, ..Limits::default() });
    let found = differences(&other, &container.facts().await.report);
    for part in ["PidsLimit", "name", profile::DEPLOYMENT_LABEL] {
        assert!(found.iter().any(|difference| difference.contains(part)), "{part}: {found:?}");
    }
    container.remove().await;
    fixture.remove().await;
}

#[tokio::test]
async fn only_the_changed_layer_is_loaded_and_no_tag_is_moved() {
    let base = Fixture::load(busybox()).await;
    let salt = format!("{:?}", base.image);
    let image =
        Builder::new("thief:1").layer(busybox_tar()).layer(Layer::new().file("/changed", salt.as_bytes(), 0o644));
    let image = image.command(&["/bin/cat", "/changed"]).build().unwrap();
    let parsed = configuration::parse(&image.config).unwrap();
    let images = base.engine.images().await.unwrap();
    let possessed: HashSet<_> = parsed.layers.iter().copied().collect();
    let wanted = missing::missing(&images, &parsed.layers, &possessed);
    assert_eq!(wanted, parsed.layers[1..]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("layer");
    std::fs::write(&file, &image.layers[1].1).unwrap();
    let sources = [
        LayerSource { layer: parsed.layers[0], file: None },
        LayerSource { layer: parsed.layers[1], file: Some((file, image.layers[1].1.len() as u64)) },
    ];
    let (archive, size) = assemble(&image.config, &sources).unwrap();
    assert!(size < 16 << 10, "{size}");
    base.engine.load_archive(archive, size).await.unwrap();
    let facts = base.engine.has_image(parsed.digest).await.unwrap().unwrap();
    assert_eq!((facts.layers.as_slice(), facts.names.as_slice()), (parsed.layers.as_slice(), &[][..]));
    base.engine.remove_image(parsed.digest).await.unwrap();
    base.engine.remove_image(parsed.digest).await.unwrap();
    base.remove().await;
}

#[tokio::test]
async fn a_load_without_its_layers_says_so_and_leaves_nothing() {
    let engine = fixture::engine();
    let salt = fixture::salt();
    let image = Builder::new("x:1").layer(Layer::new().file("/salt", salt.as_bytes(), 0o644)).command(&["/x"]).build();
    let image = image.unwrap();
    let parsed = configuration::parse(&image.config).unwrap();
    let sources = [LayerSource { layer: parsed.layers[0], file: None }];
    let (archive, size) = assemble(&image.config, &sources).unwrap();
    let error = engine.load_archive(archive, size).await.unwrap_err();
    assert!(matches!(error, EngineError::MissingLayer { .. }), "{error}");
    // Other bytes than the configuration promises.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("layer");
    let other =
        Builder::new("y:1").layer(Layer::new().file("/salt", b"other", 0o644)).build().unwrap().layers.remove(0).1;
    std::fs::write(&file, &other).unwrap();
    let sources = [LayerSource { layer: parsed.layers[0], file: Some((file, other.len() as u64)) }];
    let (archive, size) = assemble(&image.config, &sources).unwrap();
    let error = engine.load_archive(archive, size).await.unwrap_err();
    assert!(matches!(error, EngineError::InvalidImage { .. }), "{error}");
    assert_eq!(engine.has_image(parsed.digest).await.unwrap(), None);
}

#[tokio::test]
async fn an_exported_image_is_read_as_an_archive() {
    let fixture = Fixture::load(busybox()).await;
    assert_eq!(fixture.engine.resolve(&fixture.image.to_string()).await.unwrap(), fixture.image);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.tar");
    let mut file = tokio::fs::File::create(&path).await.unwrap();
    let mut pieces = fixture.engine.export(&fixture.image.to_string());
    while let Some(piece) = pieces.try_next().await.unwrap() {
        file.write_all(&piece).await.unwrap();
    }
    file.flush().await.unwrap();
    let archive = Archive::open(&path, &Selection::default()).unwrap();
    assert_eq!(archive.digest(), fixture.image);
    let mut bytes = Vec::new();
    archive.open_layer(0).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(Digest::of(&bytes), archive.layers()[0].diff_id);
    let name = format!("no-such-image-{}", std::process::id());
    let absent = fixture.engine.export(&name).next().await;
    assert!(matches!(absent, Some(Err(EngineError::NoSuchImage { .. }))), "{absent:?}");
    let absent = fixture.engine.resolve(&name).await;
    assert!(matches!(absent, Err(EngineError::NoSuchImage { .. })), "{absent:?}");
    fixture.remove().await;
}

#[tokio::test]
async fn v4_more_than_the_machine_has_is_refused_by_the_engine() {
    let fixture = Fixture::load(busybox()).await;
    let limits = Limits { cpu: 1_000_000.try_into().unwrap(), ..Limits::default() };
    let refused = fixture.engine.create_planned(&fixture.plan(&["/bin/true"], limits)).await;
    assert!(matches!(refused, Err(EngineError::Refused { .. })), "{refused:?}");
    fixture.remove().await;
}

#[tokio::test]
async fn an_image_is_pulled_by_its_digest_and_never_more_than_allowed() {
    let engine = fixture::engine();
    let salt = fixture::salt();
    let image = busybox().environment("SALT", &salt).build().unwrap();
    let registry = registry::Registry::serve(&image).await;
    let mut none = |_| ();
    let refused = engine.pull(&registry.reference, 1000, &mut none).await;
    assert!(matches!(refused, Err(EngineError::ImageTooLarge { .. })), "{refused:?}");
    let mut last = None;
    let digest = engine.pull(&registry.reference, 64 << 20, &mut |progress| last = Some(progress)).await.unwrap();
    assert_eq!(digest.to_string(), image.id().to_string());
    assert!(last.is_some());
    let facts = engine.has_image(digest).await.unwrap().unwrap();
    assert_eq!(facts.references, [registry.reference.to_string()]);
    let refused = engine.pull(&registry.reference, 1000, &mut none).await;
    assert!(matches!(refused, Err(EngineError::ImageTooLarge { .. })), "{refused:?}");
    assert!(engine.has_image(digest).await.unwrap().is_some(), "what was here before stays");
    engine.remove_image(digest).await.unwrap();
    assert_eq!(engine.has_image(digest).await.unwrap(), None);
    let absent = format!("{}@{}", registry.reference.name(), Digest::of(b"absent")).parse().unwrap();
    let absent = engine.pull(&absent, 64 << 20, &mut none).await;
    assert!(matches!(absent, Err(EngineError::NoSuchImage { .. })), "{absent:?}");
}

#[tokio::test]
async fn an_image_that_somebody_named_is_never_removed() {
    let fixture = Fixture::load(busybox()).await;
    let docker = bollard::Docker::connect_with_unix(
        peer_compute::engine::docker::DEFAULT_SOCKET,
        60,
        bollard::API_DEFAULT_VERSION,
    )
    .unwrap();
    let name = format!("peer-compute-test-{}", fixture.node);
    let options = bollard::query_parameters::TagImageOptionsBuilder::default().repo(&name).tag("1").build();
    docker.tag_image(&fixture.image.to_string(), Some(options)).await.unwrap();
    let kept = fixture.engine.remove_image(fixture.image).await;
    assert!(matches!(kept, Err(EngineError::InUse { .. })), "{kept:?}");
    assert_eq!(fixture.engine.resolve(&format!("{name}:1")).await.unwrap(), fixture.image);
    let removed = bollard::query_parameters::RemoveImageOptionsBuilder::default().build();
    docker.remove_image(&format!("{name}:1"), Some(removed), None).await.unwrap();
}

/// Alone: another version of the program counts every other one's image as a former one.
#[tokio::test]
async fn alone_the_image_of_our_own_program_is_brought_once_and_replaced_by_its_next_version() {
    let path = xtask::examples::guest_path().unwrap();
    let program = GuestProgram::read(&path).unwrap();
    let engine = fixture::engine().with_guest_program(&path);
    assert_eq!(engine.guest_image().await.unwrap(), program.image());
    let facts = engine.has_image(program.image()).await.unwrap().unwrap();
    assert_eq!((facts.names.len(), facts.wishes.entrypoint), (0, vec!["/peer-guest".to_owned()]));

    let directory = tempfile::tempdir().unwrap();
    let next = directory.path().join("peer-guest");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend(fixture::salt().bytes());
    std::fs::write(&next, bytes).unwrap();
    let upgraded = fixture::engine().with_guest_program(&next);
    let next = GuestProgram::read(&next).unwrap();
    assert_eq!(upgraded.guest_image().await.unwrap(), next.image());
    assert_eq!(upgraded.has_image(program.image()).await.unwrap(), None);

    // The first daemon brings its own again, and only its start looks for others.
    assert_eq!(engine.guest_image().await.unwrap(), program.image());
    assert!(engine.has_image(next.image()).await.unwrap().is_some());
    engine.remove_image(next.image()).await.unwrap();
    let none = fixture::engine().guest_image().await.unwrap_err();
    assert!(none.to_string().contains("install peer-guest"), "{none}");
}
