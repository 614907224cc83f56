//! Flags that say what a peer is allowed here, shared by `peers add`, `peers allow`, `invite` and `join`.

use clap::{Args, ValueEnum};
use peer_proto::deploy::{Capability, EgressGrant, list_capabilities};
use peer_proto::grant::{DeployGrant, Grants};
use peer_proto::hours::Hours;
use peer_proto::limits::Bounds;
use peer_proto::unit::{ByteSize, Millicores, Span, Timestamp};

use super::failure::Failure;
use super::limits::parse_rate;
use super::moment::{now, rfc3339};

/// What can be allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Permission {
    /// Run containers here
    Deploy,
}

/// What a peer is to be allowed here. Without `--allow`, nothing.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct GrantArguments {
    /// Allow the peer something on this machine; without it, it may do nothing here
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(super) allow: Vec<Permission>,
    /// Processors for all its deployments together, such as 2, 0.5 or 500m [default: 1]
    #[arg(long, requires = "allow", allow_hyphen_values = true, value_name = "CPUS")]
    max_cpu: Option<Millicores>,
    /// Memory for all its deployments together, such as 512m or 2g [default: 1g]
    #[arg(long, requires = "allow", allow_hyphen_values = true, value_name = "SIZE")]
    max_memory: Option<ByteSize>,
    /// Deployments at one time [default: 4]
    #[arg(long, requires = "allow", allow_hyphen_values = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    max_containers: Option<u32>,
    /// Let its containers run as root inside, if it asks for that
    #[arg(long, requires = "allow")]
    root: bool,
    /// Powers of root that its containers may keep, such as chown,setuid; may be repeated
    #[arg(long, requires = "root", value_name = "NAME", value_delimiter = ',')]
    cap: Vec<Capability>,
    /// Let a container write to its image, up to so much of this machine's disk
    #[arg(long, requires = "allow", allow_hyphen_values = true, value_name = "SIZE")]
    writable_root: Option<ByteSize>,
    /// What its containers may reach outside: none, internet (public addresses, never this machine's own networks), or
    /// HOST, HOST:PORT, *.DOMAIN or *.DOMAIN:PORT; may be repeated [default: none]
    #[arg(long, requires = "allow", value_name = "LEVEL", value_delimiter = ',', allow_hyphen_values = true)]
    egress: Vec<String>,
    /// Disk for the images that it brings, such as 10g [default: what any peer may use]
    #[arg(long, requires = "allow", allow_hyphen_values = true, value_name = "SIZE")]
    max_disk: Option<ByteSize>,
    /// Bytes per second through this machine's daemon, both ways together, such as 2m [default: any]
    #[arg(long, requires = "allow", allow_hyphen_values = true, value_name = "RATE", value_parser = parse_rate)]
    max_bandwidth: Option<ByteSize>,
    /// When its containers may run, in this machine's local time, such as 22:00-07:00 [default: always]
    #[arg(long, requires = "allow", allow_hyphen_values = true, value_name = "HOURS")]
    hours: Option<Hours>,
}

impl GrantArguments {
    /// The grants, which end `expires` after `now`, or never.
    pub(super) fn grants(&self, expires: Option<Span>, now: Timestamp) -> Result<Grants, Failure> {
        self.instead_of(&Grants::default(), expires, now)
    }

    /// The grants in the place of former ones, whose limits stay where none is named.
    pub(super) fn instead_of(&self, former: &Grants, expires: Option<Span>, now: Timestamp) -> Result<Grants, Failure> {
        let egress = egress(&self.egress)?;
        let usual = || DeployGrant::usual().bounds();
        let mut bounds = former.deploy.as_ref().map_or_else(usual, DeployGrant::bounds);
        bounds.change(&self.bounds(), &[]);
        let deploy = self.allow.contains(&Permission::Deploy).then(|| {
            let mut deploy = DeployGrant::usual();
            deploy.set_bounds(bounds);
            DeployGrant {
                expires_at: expires.map(|span| now.plus(span.seconds.saturating_mul(1000))),
                capabilities: self.cap.iter().copied().collect(),
                root: self.root,
                writable_root: self.writable_root,
                egress,
                ..deploy
            }
        });
        Ok(Grants { deploy })
    }

    fn bounds(&self) -> Bounds {
        Bounds {
            cpu: self.max_cpu,
            memory: self.max_memory,
            containers: self.max_containers,
            disk: self.max_disk,
            bandwidth: self.max_bandwidth,
            hours: self.hours.clone(),
        }
    }
}

fn egress(texts: &[String]) -> Result<EgressGrant, Failure> {
    if texts.is_empty() {
        return Ok(EgressGrant::None);
    }
    texts.join(",").parse().map_err(|error| Failure::argument(format!("--egress: {error}")))
}

/// Reads a span that is not empty.
pub(super) fn parse_life(text: &str) -> Result<Span, String> {
    match text.parse::<Span>() {
        Ok(span) if span.seconds > 0 => Ok(span),
        Ok(_) => Err("the span must be longer than nothing".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Grants in words: `deploy (1 CPU, 1 GiB, 4 containers)` or `nothing`.
pub(super) fn in_words(grants: &Grants) -> String {
    describe(grants, now(), "")
}

/// The same where a grant is being given: `deploy (1 CPU, 1 GiB, 4 containers, without end)`.
pub(super) fn in_words_with_end(grants: &Grants) -> String {
    describe(grants, now(), ", without end")
}

fn describe(grants: &Grants, now: Timestamp, endless: &str) -> String {
    let Some(deploy) = &grants.deploy else { return "nothing".to_owned() };
    let end = match deploy.expires_at {
        Some(end) if deploy.is_live(now) => format!(", until {}", rfc3339(end)),
        Some(end) => format!(", expired {}", rfc3339(end)),
        None => endless.to_owned(),
    };
    let DeployGrant { max_cpu, max_memory, max_containers, max_disk, max_bandwidth, hours, egress, .. } = deploy;
    let root = if deploy.root { ", root" } else { "" };
    let capabilities = match list_capabilities(&deploy.capabilities) {
        none if none.is_empty() => none,
        some => format!(" with {some}"),
    };
    let writable = deploy.writable_root.map(|size| format!(", writable root of {size}")).unwrap_or_default();
    let disk = max_disk.map(|disk| format!(", {disk} disk")).unwrap_or_default();
    let bandwidth = max_bandwidth.map(|bandwidth| format!(", {bandwidth}/s")).unwrap_or_default();
    let hours = hours.as_ref().map(|hours| format!(", at {hours}")).unwrap_or_default();
    let egress = if egress.is_none() { String::new() } else { format!(", egress {egress}") };
    let more = format!("{root}{capabilities}{writable}{egress}{disk}{bandwidth}{hours}{end}");
    format!("deploy ({max_cpu} CPU, {max_memory}, {max_containers} containers{more})")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn grants_tell_whether_they_end_and_have_ended() {
        let arguments = GrantArguments { allow: vec![Permission::Deploy], ..GrantArguments::default() };
        let endless = arguments.grants(None, Timestamp(0)).unwrap();
        assert_eq!(describe(&endless, Timestamp(1), ""), "deploy (1 CPU, 1 GiB, 4 containers)");
        assert!(in_words_with_end(&endless).ends_with(" containers, without end)"));
        let ending = arguments.grants(Some(Span { seconds: 60 }), Timestamp(0)).unwrap();
        assert!(describe(&ending, Timestamp(1), "").ends_with(", until 1970-01-01T00:01:00.000Z)"));
        assert!(describe(&ending, Timestamp(60_000), "").ends_with(", expired 1970-01-01T00:01:00.000Z)"));
        assert_eq!(in_words_with_end(&Grants::default()), "nothing");
        let more = GrantArguments { root: true, cap: vec![Capability::Setuid, Capability::Chown], ..arguments };
        assert!(
            in_words(&more.grants(None, Timestamp(0)).unwrap()).ends_with("4 containers, root with chown, setuid)")
        );
    }

    #[test]
    fn egress_is_told_and_must_be_readable() {
        let with = |egress: &[&str]| GrantArguments {
            allow: vec![Permission::Deploy],
            egress: egress.iter().map(|text| (*text).to_owned()).collect(),
            ..GrantArguments::default()
        };
        let granted = with(&["*.example.org:443", "192.0.2.1"]).grants(None, Timestamp(0)).unwrap();
        assert!(describe(&granted, Timestamp(0), "").ends_with("containers, egress 192.0.2.1,*.example.org:443)"));
        for wrong in [&["internet", "a.b"][..], &["localhost"], &["*"]] {
            assert!(with(wrong).grants(None, Timestamp(0)).unwrap_err().to_string().contains("--egress"), "{wrong:?}");
        }
    }

    #[test]
    fn limits_that_were_set_stay_where_none_is_named() {
        let mut former = DeployGrant { hours: "22:00-07:00".parse().ok(), ..DeployGrant::usual() };
        former.max_disk = "5g".parse().ok();
        let former = Grants { deploy: Some(former) };
        let allow = vec![Permission::Deploy];
        let max_disk = "1g".parse().ok();
        let arguments = GrantArguments { allow, max_disk, ..GrantArguments::default() };
        let grants = arguments.instead_of(&former, None, Timestamp(0)).unwrap();
        let words = "deploy (1 CPU, 1 GiB, 4 containers, 1 GiB disk, at 22:00-07:00)";
        assert_eq!(describe(&grants, Timestamp(1), ""), words);
        assert_eq!(GrantArguments::default().instead_of(&former, None, Timestamp(0)).unwrap(), Grants::default());
    }
}
