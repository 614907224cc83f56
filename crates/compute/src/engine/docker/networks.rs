//! Networks: create, compare, remove, connect.

use std::collections::HashMap;

use bollard::models::{
    EndpointSettings, Ipam, IpamConfig, NetworkConnectRequest, NetworkCreateRequest, NetworkInspect,
};
use bollard::query_parameters::{InspectNetworkOptions, ListNetworksOptionsBuilder};
use tokio::time::timeout;

use super::{CHANGE, DockerEngine, LOOK_UP, call, failure};
use crate::engine::{ContainerId, EngineError, NetworkFacts, NetworkPlan, quote};
use crate::profile::NODE_LABEL;

const BRIDGE_NAME: &str = "com.docker.network.bridge.name";
const MASQUERADE: &str = "com.docker.network.bridge.enable_ip_masquerade";
const BETWEEN_CONTAINERS: &str = "com.docker.network.bridge.enable_icc";

impl DockerEngine {
    pub(super) async fn list_own_networks(&self, node: &str) -> Result<Vec<String>, EngineError> {
        let filters = HashMap::from([("label", vec![format!("{NODE_LABEL}={node}")])]);
        let options = ListNetworksOptionsBuilder::default().filters(&filters).build();
        let found = call("list networks", LOOK_UP, self.client()?.list_networks(Some(options))).await?;
        Ok(found.into_iter().filter_map(|network| network.name).collect())
    }

    pub(super) async fn judge_network(&self, plan: &NetworkPlan) -> Result<Option<NetworkFacts>, EngineError> {
        let name = plan.name();
        let inspection = self.client()?.inspect_network(&name, None::<InspectNetworkOptions>);
        match timeout(LOOK_UP, inspection)
            .await
            .map_err(|_| EngineError::TimedOut { operation: "inspect network".into() })?
        {
            Ok(report) => Ok(Some(NetworkFacts { differences: differences(&request(plan), &report), name })),
            Err(error) if failure::status(&error) == Some(404) => Ok(None),
            Err(error) => Err(failure::translate("inspect network", error)),
        }
    }

    pub(super) async fn make_network(&self, plan: &NetworkPlan) -> Result<(), EngineError> {
        call("create network", CHANGE, self.client()?.create_network(request(plan))).await.map(|_| ())
    }

    pub(super) async fn delete_network(&self, name: &str) -> Result<(), EngineError> {
        let removal = self.client()?.remove_network(name);
        match timeout(CHANGE, removal)
            .await
            .map_err(|_| EngineError::TimedOut { operation: "remove network".into() })?
        {
            Ok(()) => Ok(()),
            Err(error) => match failure::status(&error) {
                Some(404) => Ok(()),
                // The engine's word for a network with containers that run.
                Some(403) => Err(EngineError::InUse { message: quote(&error.to_string()) }),
                _ => Err(failure::translate("remove network", error)),
            },
        }
    }

    pub(super) async fn connect_container(
        &self,
        container: &ContainerId,
        network: &str,
        alias: &str,
    ) -> Result<(), EngineError> {
        let endpoint = EndpointSettings { aliases: Some(vec![alias.to_owned()]), ..EndpointSettings::default() };
        let request = NetworkConnectRequest { container: container.to_string(), endpoint_config: Some(endpoint) };
        call("connect to network", CHANGE, self.client()?.connect_network(network, request)).await
    }
}

fn request(plan: &NetworkPlan) -> NetworkCreateRequest {
    let range = IpamConfig {
        subnet: Some(plan.subnet.to_string()),
        gateway: Some(plan.gateway().to_string()),
        ..IpamConfig::default()
    };
    let options = [
        (BRIDGE_NAME, plan.bridge()),
        // The wall translates addresses itself, so that nothing gets out without it.
        (MASQUERADE, "false".to_owned()),
        (BETWEEN_CONTAINERS, (!plan.outward).to_string()),
    ];
    NetworkCreateRequest {
        name: plan.name(),
        driver: Some("bridge".into()),
        internal: Some(!plan.outward),
        attachable: Some(false),
        enable_ipv6: Some(false),
        ipam: Some(Ipam { driver: Some("default".into()), config: Some(vec![range]), ..Ipam::default() }),
        options: Some(options.map(|(name, value)| (name.to_owned(), value)).into()),
        labels: Some([(NODE_LABEL.to_owned(), plan.node.clone())].into()),
        ..NetworkCreateRequest::default()
    }
}

/// Every way in which the reported network differs from what was asked for.
fn differences(told: &NetworkCreateRequest, report: &NetworkInspect) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |name: &str, holds: bool, shown: String| {
        if !holds {
            found.push(format!("{name} is {}", quote(&shown)));
        }
    };
    let ranges = |ipam: &Option<Ipam>| -> Vec<_> {
        let configurations = ipam.iter().flat_map(|ipam| ipam.config.iter().flatten());
        configurations.map(|one| (one.subnet.clone(), one.gateway.clone())).collect()
    };
    check("name", report.name.as_deref() == Some(&told.name), format!("{:?}", report.name));
    check("driver", report.driver == told.driver, format!("{:?}", report.driver));
    check("Internal", report.internal == told.internal, format!("{:?}", report.internal));
    check("EnableIPv6", report.enable_ipv6 == Some(false), format!("{:?}", report.enable_ipv6));
    check("IPAM", ranges(&report.ipam) == ranges(&told.ipam), format!("{:?}", ranges(&report.ipam)));
    // Later engines repeat here which families the network has, which is compared above.
    let mut options = report.options.clone().unwrap_or_default();
    options.retain(|name, _| !name.starts_with("com.docker.network.enable_ipv"));
    check("Options", Some(&options) == told.options.as_ref(), format!("{options:?}"));
    let labels = report.labels.clone().unwrap_or_default();
    let lacking = told.labels.iter().flatten().any(|(name, value)| labels.get(name) != Some(value));
    check("Labels", !lacking, "not ours".into());
    found
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::wall::rules::Tag;

    fn plan(outward: bool) -> NetworkPlan {
        let (tag, subnet) = (Tag::of("mark"), "198.18.0.8/29".parse().unwrap());
        NetworkPlan { tag, node: "mark".into(), number: 7, subnet, outward }
    }

    fn reported(told: &NetworkCreateRequest) -> NetworkInspect {
        NetworkInspect {
            name: Some(told.name.clone()),
            driver: told.driver.clone(),
            internal: told.internal,
            enable_ipv6: Some(false),
            ipam: told.ipam.clone(),
            options: told.options.clone(),
            labels: told.labels.clone(),
            ..NetworkInspect::default()
        }
    }

    #[test]
    fn v4n_every_change_of_a_network_is_found() {
        type Spoil = fn(&mut NetworkInspect);
        let cases: [(&str, Spoil); 7] = [
            ("driver", |r| r.driver = Some("macvlan".into())),
            ("Internal", |r| r.internal = Some(!r.internal.unwrap())),
            ("EnableIPv6", |r| r.enable_ipv6 = Some(true)),
            ("IPAM", |r| r.ipam = None),
            ("Options", |r| drop(r.options.as_mut().unwrap().remove(BRIDGE_NAME))),
            ("Options", |r| drop(r.options.as_mut().unwrap().insert(MASQUERADE.into(), "true".into()))),
            ("Labels", |r| r.labels = None),
        ];
        for outward in [true, false] {
            let told = request(&plan(outward));
            assert_eq!(differences(&told, &reported(&told)), Vec::<String>::new());
            for (name, spoil) in cases {
                let mut report = reported(&told);
                spoil(&mut report);
                let found = differences(&told, &report);
                assert!(found.len() == 1 && found[0].starts_with(name), "{name}: {found:?}");
            }
        }
    }

    #[test]
    fn v4n_no_network_of_ours_translates_by_the_engine_and_only_private_ones_join_containers() {
        for outward in [true, false] {
            let options = request(&plan(outward)).options.unwrap();
            assert_eq!(options[MASQUERADE], "false");
            assert_eq!(options[BETWEEN_CONTAINERS], (!outward).to_string());
            assert!(options[BRIDGE_NAME].len() <= 15);
        }
    }
}
