//! Images without a registry: every form of archive, only what lacks, nothing by a digest alone, nothing of others touched.

use std::path::Path;

use peer_proto::code::Code;
use peer_proto::deploy::{Event, ImageOffer, LayerReply, Request};
use serde_json::Value;
use xtask::image::{Compression, Image, Layer};

use crate::world::{Loaded, Machine, Pair, Registry, Wire, docker, docker_try, eventually, hello, noise, salted};

fn size(image: &Image) -> u64 {
    image.layers.iter().map(|(_, tar)| tar.len() as u64).sum()
}

fn deploy(pair: &Pair, image: &str, name: &str) -> Value {
    pair.alice.json(&["deploy", image, "--peer", "bob", "--name", name, "--cpu", "0.1"])
}

#[test]
fn every_form_of_archive_is_deployed() {
    let pair = Pair::start();
    let (image, files) = (hello(), &pair.files);
    let forms = [
        ("docker", files.write(&image)),
        ("oci", files.write_oci(&image, Compression::None)),
        ("gzip", files.write_oci(&image, Compression::Gzip)),
        ("directory", files.write_oci_directory(&image)),
    ];
    for (name, path) in forms {
        let deployed = deploy(&pair, &path, name);
        assert_eq!((&deployed["state"], &deployed["image"]), (&"running".into(), &image.id().to_string().into()));
        pair.alice.ctl(&["rm", "--force", name]);
    }
    let packed = pair.files.write_oci(&hello(), Compression::Gzip);
    assert_eq!(deploy(&pair, &packed, "fresh")["state"], "running");
}

#[test]
fn an_image_of_the_local_engine_is_deployed_by_its_name() {
    let (alice, bob) = (Machine::start("alice"), Machine::start("bob"));
    alice.join(&bob, &[]);
    let files = crate::world::Files::new();
    let image = hello();
    let loaded = Loaded::load(&image, &files);
    let deployed = alice.json(&["deploy", &loaded.name, "--peer", "bob", "--name", "web"]);
    assert_eq!(deployed["image"], image.id().to_string());
    assert_eq!(deployed["specification"]["image_name"], loaded.name.as_str());
    let sentence = alice.try_ctl(&["deploy", "peer-test-nothing:1", "--peer", "bob"]).refused("no_such_image", 3);
    assert!(sentence.contains("peer-test-nothing:1"), "{sentence}");
}

#[test]
fn a_second_deployment_sends_only_the_layer_that_changed() {
    let pair = Pair::start();
    let base = salted("hello").layer(Layer::new().file("/base", &noise(4 << 20), 0o644));
    let version = |content: &[u8]| base.clone().layer(Layer::new().file("/version", content, 0o644)).build().unwrap();
    let (first, second) = (version(&noise(1 << 20)), version(&noise(1 << 20)));
    let sent = deploy(&pair, &pair.files.write(&first), "first");
    assert_eq!(sent["bytes_sent"].as_u64().unwrap(), size(&first));
    let sent = deploy(&pair, &pair.files.write(&second), "second");
    let changed = second.layers.last().unwrap().1.len() as u64;
    assert_eq!((&sent["layers_sent"], &sent["bytes_sent"]), (&1.into(), &changed.into()));
    let again = deploy(&pair, &pair.files.write(&second), "third");
    assert_eq!((&again["layers_sent"], &again["bytes_sent"]), (&0.into(), &0.into()));
}

#[test]
fn a_second_try_skips_what_has_arrived() {
    let mut pair = Pair::start();
    let image = salted("hello").layer(Layer::new().file("/large", &noise(160 << 20), 0o644)).build().unwrap();
    let archive = pair.files.write(&image);
    let first = pair.alice.begin(&["deploy", &archive, "--peer", "bob", "--name", "web"]);
    eventually("a part has arrived", || (spooled(&pair.bob.data().join("spool")) > 24 << 20).then_some(()));
    pair.bob.kill();
    let output = first.end();
    assert_ne!(output.status, 0, "{output:?}");
    pair.bob.up();
    eventually("alice reaches bob", || {
        (!pair.alice.json(&["peers", "show", "bob"])["connection"].is_null()).then_some(())
    });
    // Nobody is there to send the rest of the first try, so that a second takes its place.
    let deployed = deploy(&pair, &archive, "web");
    let sent = deployed["bytes_sent"].as_u64().unwrap();
    assert!(sent <= size(&image) - (16 << 20), "{sent} of {} bytes were sent again", size(&image));
}

fn spooled(path: &Path) -> u64 {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => spooled(&entry.path()),
        _ => entry.metadata().map_or(0, |metadata| metadata.len()),
    });
    sizes.sum()
}

#[test]
fn v2_a_layer_cannot_be_claimed_by_its_digest() {
    let pair = Pair::start();
    let image = salted("hello").layer(Layer::new().file("/secret", b"alice's own", 0o644)).build().unwrap();
    deploy(&pair, &pair.files.write(&image), "secret");
    let mut carol = Machine::without_engine("carol");
    carol.join(&pair.bob, &[]);
    carol.kill();
    let wire = Wire::of(&carol, &[&pair.bob]);
    // She knows the configuration, and so every digest, and has none of the bytes.
    let layer_sizes = image.layers.iter().map(|(_, tar)| tar.len() as u64).collect();
    let offer = ImageOffer { configuration: image.config.clone(), layer_sizes };
    let push_again = Request::Push(offer.clone());
    let push = wire.seal(&pair.bob, Request::Push(offer), 0);
    let mut answer = wire.begin(&pair.bob, &push.bytes);
    let Some(Event::Want(wanted)) = answer.next() else { panic!("bob must want the bytes") };
    assert_eq!(wanted.len(), image.layers.len());
    let (_, tar) = image.layers.last().unwrap();
    let last = *wanted.last().unwrap();
    let LayerReply::Refused(problem) = wire.layer(&pair.bob, push.hash, last, &vec![0; tar.len()]) else {
        panic!("other bytes were taken")
    };
    assert!([Code::DigestMismatch, Code::InvalidImage].contains(&problem.code), "{problem:?}");
    let Some(Event::Failed(told)) = answer.next() else { panic!("the push must end with the refusal") };
    assert_eq!(told.problem.code, problem.code);
    // With the bytes themselves she may.
    let push = wire.seal(&pair.bob, push_again, 0);
    let mut answer = wire.begin(&pair.bob, &push.bytes);
    let Some(Event::Want(wanted)) = answer.next() else { panic!("bob must still want the bytes") };
    for (digest, (_, tar)) in wanted.iter().zip(&image.layers) {
        assert_eq!(wire.layer(&pair.bob, push.hash, *digest, tar), LayerReply::Stored);
    }
    assert!(matches!(answer.next(), Some(Event::Pushed(_))));
}

#[test]
fn a_transferred_archive_cannot_repoint_a_tag() {
    let pair = Pair::start();
    let loaded = Loaded::load(&hello(), &pair.files);
    let mut hostile = hello();
    hostile.name.clone_from(&loaded.name);
    deploy(&pair, &pair.files.write(&hostile), "web");
    assert_eq!(docker(&["image", "inspect", "--format", "{{.Id}}", &loaded.name]).trim(), loaded.id);
    let tags = docker(&["image", "inspect", "--format", "{{.RepoTags}}", &hostile.id().to_string()]);
    assert!(!tags.contains(&loaded.name), "{tags}");
}

#[test]
fn images_that_peers_brought_are_counted_and_cleaned_and_others_never() {
    let mut pair = Pair::start();
    let (brought, local) = (hello(), hello());
    let loaded = Loaded::load(&local, &pair.files);
    deploy(&pair, &pair.files.write(&brought), "web");
    deploy(&pair, &pair.files.write(&local), "same");
    let listed = pair.bob.json(&["images"]);
    let row = listed.as_array().unwrap().iter().find(|row| row["digest"] == brought.id().to_string()).unwrap();
    assert_eq!((&row["used_by"], &row["size_bytes"]), (&1.into(), &size(&brought).into()), "{row}");
    pair.alice.ctl(&["rm", "--force", "web", "same"]);
    pair.bob.stop().success();
    pair.bob.database().execute("UPDATE image SET last_used_at = 0", []).unwrap();
    pair.bob.up();
    let gone = |image: &Image| docker_try(&["image", "inspect", &image.id().to_string()]).status != 0;
    eventually("the unused image is gone", || gone(&brought).then_some(()));
    eventually("it is not listed any more", || {
        (!pair.bob.ctl(&["images", "--json"]).stdout.contains(&brought.id().to_string())).then_some(())
    });
    assert!(loaded.is_there());
}

#[test]
fn an_image_is_pushed_alone() {
    let pair = Pair::start();
    let image = hello();
    let archive = pair.files.write(&image);
    let pushed = pair.alice.json(&["push", &archive, "--peer", "bob"]);
    assert_eq!(pushed["image"], image.id().to_string(), "{pushed}");
    assert_eq!(pushed["bytes_sent"].as_u64().unwrap(), size(&image));
    assert_eq!(pair.alice.json(&["push", &archive, "--peer", "bob"])["bytes_sent"], 0);
    assert_eq!(deploy(&pair, &archive, "web")["bytes_sent"], 0);
    assert!(pair.bob.ctl(&["images"]).stdout.contains(&image.id().hex()[..12]));
}

#[test]
fn g4_nothing_is_fetched_before_admission() {
    let pair = Pair::granted(&["--max-cpu", "1"]);
    let image = hello();
    let registry = Registry::serve(&image);
    let flags = ["--peer", "bob", "--name", "web", "--pull"];
    let deploy = |more: &[&str]| pair.alice.try_ctl(&[&["deploy", &registry.reference], &flags[..], more].concat());
    deploy(&["--cpu", "2"]).refused("over_limit", 4);
    pair.bob.ctl(&["peers", "allow", "alice", "--nothing"]);
    deploy(&[]).refused("not_granted", 4);
    let archive = pair.files.write(&image);
    pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "web"]).refused("not_granted", 4);
    pair.alice.try_ctl(&["push", &archive, "--peer", "bob"]).refused("not_granted", 4);
    assert_eq!(registry.requests(), 0, "bob asked the registry");
    assert_eq!(spooled(&pair.bob.data().join("spool")), 0, "bob took a part of the image");
    assert_ne!(docker_try(&["image", "inspect", &image.id().to_string()]).status, 0, "bob has the image");
    // The same is fetched as soon as it is admitted.
    pair.bob.ctl(&["peers", "allow", "alice", "--allow", "deploy"]);
    deploy(&[]).success();
    assert!(registry.requests() > 0);
}

#[test]
fn an_image_is_pulled_by_its_digest() {
    let pair = Pair::start();
    let image = hello();
    let registry = Registry::serve(&image);
    let flags = ["--peer", "bob", "--name", "web", "--pull"];
    let deployed = pair.alice.json(&[&["deploy", &registry.reference], &flags[..]].concat());
    assert_eq!((&deployed["state"], &deployed["bytes_sent"]), (&"running".into(), &0.into()), "{deployed}");
    let (name, _) = registry.reference.split_once('@').unwrap();
    for loose in [name.to_owned(), format!("{name}:latest")] {
        let sentence = pair.alice.try_ctl(&[&["deploy", &loose], &flags[..]].concat()).refused("invalid_argument", 2);
        assert!(sentence.contains("sha256"), "{sentence}");
    }
    let absent = format!("{name}@sha256:{}", "0".repeat(64));
    let flags = ["--peer", "bob", "--name", "absent", "--pull"];
    let output = pair.alice.try_ctl(&[&["deploy", &absent], &flags[..]].concat());
    assert_eq!(output.code(), "no_such_image", "{output:?}");
}

#[test]
fn the_same_image_is_deployed_twice_at_once() {
    let pair = Pair::start();
    let image = salted("hello").layer(Layer::new().file("/large", &noise(48 << 20), 0o644));
    let archive = pair.files.write(&image.layer(Layer::new().file("/more", &noise(8 << 20), 0o644)).build().unwrap());
    let begin = |name| pair.alice.begin(&["deploy", &archive, "--peer", "bob", "--name", name, "--cpu", "0.1"]);
    for running in ["one", "two", "three"].map(begin) {
        running.end().success();
    }
    for name in ["one", "two", "three"] {
        assert_eq!(pair.alice.state(name), "running");
    }
    eventually("nothing is left on the way", || (spooled(&pair.bob.data().join("spool")) == 0).then_some(()));
}

#[test]
fn v4_what_the_configuration_shows_is_refused_before_the_upload() {
    let pair = Pair::start();
    let mut foreign = hello();
    foreign.config = String::from_utf8(foreign.config).unwrap().replace("\"linux\"", "\"windows\"").into_bytes();
    let programless = salted("hello").command::<&str>(&[]).build().unwrap();
    for (name, image, code, word) in [
        ("system", foreign, "invalid_image", "windows"),
        ("volume", salted("hello").volume("/proc/x").build().unwrap(), "invalid_image", "/proc/x"),
        ("directory", salted("hello").working_directory("a/b").build().unwrap(), "invalid_image", "a/b"),
        ("program", programless.clone(), "invalid_argument", "entrypoint"),
    ] {
        let archive = pair.files.write(&image);
        let output = pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", name]);
        assert!(output.refused(code, 2).contains(word), "{name}");
        if code == "invalid_image" {
            pair.alice.try_ctl(&["push", &archive, "--peer", "bob"]).refused(code, 2);
        }
    }
    assert!(pair.bob.has_audited("V4"));
    assert_eq!(spooled(&pair.bob.data().join("spool")), 0, "bob took a part of an image");
    assert_eq!(pair.bob.json(&["ps", "--hosted", "--all"])["deployments"], serde_json::json!([]));
    // What it is to run may come with the deployment.
    let archive = pair.files.write(&programless);
    let deployed = pair.alice.json(&["deploy", &archive, "--peer", "bob", "--name", "program", "--", "/hello"]);
    assert_eq!(deployed["state"], "running");
}

#[test]
fn v5_images_of_one_owner_are_bounded() {
    let alice = Machine::without_engine("alice");
    let bob = Machine::with("bob", &["--image-size-max", "16m"]);
    alice.join(&bob, &["--max-cpu", "2", "--max-memory", "2g", "--max-containers", "8"]);
    let pair = Pair { alice, bob, files: crate::world::Files::new() };
    let large = || {
        let rest = (15 << 20) - usize::try_from(size(&hello())).unwrap();
        pair.files.write(&salted("hello").layer(Layer::new().file("/large", &noise(rest), 0o644)).build().unwrap())
    };
    let archives = [0, 1, 2, 3].map(|_| large());
    for (n, archive) in archives.iter().enumerate() {
        deploy(&pair, archive, &format!("web{n}"));
    }
    let hostile = salted("hello").layer(Layer::raw(noise(4096))).build().unwrap();
    let archive = pair.files.write(&hostile);
    pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "more"]).refused("invalid_image", 2);
    let before = spooled(&pair.bob.data().join("spool"));
    let more = large();
    let sentence = pair.alice.try_ctl(&["push", &more, "--peer", "bob"]).refused("over_limit", 4);
    assert!(sentence.contains("peerctl rm"), "{sentence}");
    pair.alice.try_ctl(&["deploy", &more, "--peer", "bob", "--name", "more"]).refused("over_limit", 4);
    assert!(pair.bob.has_audited("V5"));
    assert_eq!(spooled(&pair.bob.data().join("spool")), before);
    let hosted = pair.bob.json(&["ps", "--hosted", "--all"]).to_string();
    assert!(hosted.contains("\"more\""), "what a refused request would have replaced stays: {hosted}");
    // What is here already costs nothing more.
    pair.alice.ctl(&["push", &archives[0], "--peer", "bob"]);
}

/// The machine's daemon starts anew, and every image has been unused for long; this one is looked at first.
fn forget_use(bob: &mut Machine, first: &Image) {
    bob.stop().success();
    let forget = "UPDATE image SET last_used_at = (lower(hex(digest)) = ?1)";
    bob.database().execute(forget, [first.id().hex()]).unwrap();
    bob.up();
}

#[test]
fn an_image_that_the_machines_owner_fetched_to_keep_is_not_cleaned() {
    let mut pair = Pair::start();
    let (kept, other) = (hello(), hello());
    let (ours, theirs) = (Registry::serve(&kept), Registry::serve(&kept));
    let flags = ["--peer", "bob", "--name", "web", "--pull", "--cpu", "0.1"];
    pair.alice.ctl(&[&["deploy", &ours.reference], &flags[..]].concat());
    docker(&["pull", "--quiet", &theirs.reference]);
    deploy(&pair, &pair.files.write(&other), "other");
    pair.alice.ctl(&["rm", "--force", "web", "other"]);
    forget_use(&mut pair.bob, &kept);
    let there = |image: &Image| docker_try(&["image", "inspect", &image.id().to_string()]).status == 0;
    eventually("the other image is gone", || (!there(&other)).then_some(()));
    assert!(there(&kept));
    // Once it is nobody's but ours, it goes.
    docker(&["rmi", &theirs.reference]);
    forget_use(&mut pair.bob, &kept);
    eventually("the image is gone", || (!there(&kept)).then_some(()));
}

#[test]
fn a_pull_that_a_crash_cut_short_is_counted() {
    let mut pair = Pair::start();
    let (image, before) = (hello(), hello());
    let (registry, earlier) = (Registry::serve(&image), Registry::serve(&before));
    pair.bob.kill();
    for reference in [&registry.reference, &earlier.reference] {
        docker(&["pull", "--quiet", reference]);
    }
    let alice: peer_proto::PeerId = pair.alice.peer_id.parse().unwrap();
    let present = before.id().hex();
    for reference in [&registry.reference, &earlier.reference] {
        let insert = format!("INSERT INTO image_pull VALUES (?1, ?2, x'{present}')");
        pair.bob.database().execute(&insert, (alice.to_bytes(), reference)).unwrap();
    }
    pair.bob.up();
    let listed = || pair.bob.json(&["images"]).to_string();
    eventually("the image is listed", || listed().contains(&image.id().to_string()).then_some(()));
    eventually("both pulls are settled", || {
        let count = pair.bob.database().query_row("SELECT count(*) FROM image_pull", [], |row| row.get::<_, u32>(0));
        (count.unwrap() == 0).then_some(())
    });
    assert!(!listed().contains(&before.id().to_string()), "what was there before is its owner's");
    docker(&["rmi", &earlier.reference]);
}
