//! What a container is made from: the request that its owner signed, which is verified again where the engine is.
//!
//! Whoever asks for a container hands over the signed bytes and a few numbers, and no specification beside them. So it
//! makes no difference what else it says or has come to believe: the container is the one that was signed.

use minicbor::{Decode, Encode};
use peer_proto::{
    PeerId,
    code::{Code, Problem},
    deploy::{DeployRequest, ImageSource, Request, Specification},
    envelope,
    frame::peer_id,
    id::{DeploymentId, Digest},
};

use crate::{
    engine::{EngineFacts, ImageFacts},
    isolation,
    profile::{self, ContainerPlan},
    wall::{attach::Attachment, rules::Tag},
};

/// Asks for the container of one deployment.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Order {
    /// Whose it is, by the key that signed.
    #[n(0)]
    #[cbor(with = "peer_id")]
    pub owner: PeerId,
    /// The machine that the request was made for.
    #[n(1)]
    #[cbor(with = "peer_id")]
    pub audience: PeerId,
    /// The signed request, as it came.
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub envelope: Vec<u8>,
    /// The image that the request names, in the engine.
    #[n(3)]
    pub image: Digest,
    /// Number from which the user id is made.
    #[n(4)]
    pub slot: u32,
    /// Marks whose container it is.
    #[n(5)]
    pub node: String,
    /// The networks that were made for it, if the request asks for any.
    #[n(6)]
    pub attachment: Attachment,
}

/// An order whose signature has been verified.
#[derive(Debug)]
pub struct Verified<'a> {
    order: &'a Order,
    deployment: DeploymentId,
    request: Box<DeployRequest>,
}

impl Order {
    /// Verifies the signature, and that the request asks for a deployment.
    pub fn verify(&self) -> Result<Verified<'_>, Problem> {
        let signed = envelope::open_kept(&self.envelope, &self.owner, &self.audience);
        let signed = signed.map_err(|error| error.to_problem())?;
        let deployment = DeploymentId::derive(&self.owner, &signed.request_id());
        match signed.into_body() {
            Request::Deploy(request) => Ok(Verified { order: self, deployment, request }),
            _ => Err(Problem::new(Code::Malformed, "the signed request does not ask for a deployment")),
        }
    }
}

impl Verified<'_> {
    /// The deployment, whose id follows from signer and request.
    pub fn deployment(&self) -> DeploymentId {
        self.deployment
    }

    /// What was signed.
    pub fn specification(&self) -> &Specification {
        &self.request.specification
    }

    /// Decides how the container runs, from what was signed and from what the engine says of image and machine.
    pub fn plan(&self, image: &ImageFacts, engine: &EngineFacts) -> Result<ContainerPlan, Problem> {
        if !self.is_signed(image) {
            let message = format!("image {} is not the one that the signed request names", image.digest);
            return Err(Problem::new(Code::NoSuchImage, message));
        }
        let uid = profile::uid_for(self.order.slot, engine.user_namespace || engine.rootless)
            .ok_or_else(|| Problem::new(Code::NoCapacity, "no user id is free for one more deployment"))?;
        let specification = &self.request.specification;
        let runtime = isolation::meet(specification, engine)?;
        let networks = self.order.attachment.networks(Tag::of(&self.order.node), specification)?;
        let (id, order) = (self.deployment, self.order);
        let plan = profile::plan(specification, image, id, order.owner, &order.node, uid, runtime)?;
        Ok(plan.in_networks(networks))
    }

    fn is_signed(&self, image: &ImageFacts) -> bool {
        match &self.request.image {
            ImageSource::Offered(offer) => offer.digest() == image.digest,
            // The engine lists the manifests by which it has fetched an image.
            ImageSource::Registry(reference) => {
                let manifest = format!("@{}", reference.digest());
                image.references.iter().any(|known| known.ends_with(&manifest))
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
pub(crate) mod tests {
    use peer_proto::{
        deploy::{ImageOffer, Specification},
        id::{Incarnation, RequestId},
        identity::Identity,
        unit::Timestamp,
    };

    use super::*;
    use crate::profile::tests::{image, specification};

    pub(crate) const CONFIGURATION: &[u8] = b"configuration";

    /// A signed order, and the image that it names.
    pub(crate) fn order(owner: &Identity, specification: Specification) -> (Order, ImageFacts) {
        let offer = ImageOffer { configuration: CONFIGURATION.to_vec(), layer_sizes: vec![1] };
        let image = ImageFacts { digest: offer.digest(), ..image() };
        let request = DeployRequest { specification, image: ImageSource::Offered(offer) };
        (order_of(owner, Request::Deploy(Box::new(request)), image.digest), image)
    }

    fn order_of(owner: &Identity, body: Request, image: Digest) -> Order {
        let audience = Identity::generate().peer_id();
        let sealed = envelope::seal(owner, audience, Incarnation([1; 16]), RequestId::random(), Timestamp(1), body);
        let node = "node".to_owned();
        Order {
            owner: owner.peer_id(),
            audience,
            envelope: sealed.bytes,
            image,
            slot: 3,
            node,
            attachment: Attachment::default(),
        }
    }

    pub(crate) fn engine() -> EngineFacts {
        EngineFacts {
            seccomp: true,
            cgroup_version: 2,
            cpus: 2,
            memory: 1 << 30,
            architecture: "amd64".into(),
            runtime: "runc".into(),
            runtimes: vec!["runc".into()],
            ..EngineFacts::default()
        }
    }

    #[test]
    fn v2_every_changed_bit_of_an_order_is_refused() {
        let (order, _) = order(&Identity::generate(), specification());
        assert!(order.verify().is_ok());
        for bit in 0..order.envelope.len() * 8 {
            let mut changed = order.clone();
            changed.envelope[bit / 8] ^= 1 << (bit % 8);
            assert!(changed.verify().is_err(), "bit {bit}");
        }
    }

    #[test]
    fn v2_an_order_in_anothers_name_or_for_another_machine_is_refused() {
        let (order, _) = order(&Identity::generate(), specification());
        let other = Identity::generate().peer_id();
        let stolen = Order { owner: other, ..order.clone() };
        assert_eq!(stolen.verify().unwrap_err().code, Code::WrongSigner);
        let elsewhere = Order { audience: other, ..order };
        assert_eq!(elsewhere.verify().unwrap_err().code, Code::WrongAudience);
    }

    #[test]
    fn v2_the_container_is_the_signed_one_with_the_signed_image() {
        let owner = Identity::generate();
        let (order, image) = order(&owner, specification());
        let verified = order.verify().unwrap();
        let plan = verified.plan(&image, &engine()).unwrap();
        assert_eq!(plan.name(), profile::container_name(&verified.deployment()));
        let another = ImageFacts { digest: Digest::of(b"another"), ..image };
        assert_eq!(verified.plan(&another, &engine()).unwrap_err().code, Code::NoSuchImage);
    }

    #[test]
    fn v2_an_image_of_a_registry_is_known_by_its_manifest() {
        let manifest = Digest::of(b"manifest");
        let source = ImageSource::Registry(format!("registry.example/a@{manifest}").parse().unwrap());
        let request = DeployRequest { specification: specification(), image: source };
        let order = order_of(&Identity::generate(), Request::Deploy(Box::new(request)), Digest::of(b"image"));
        let verified = order.verify().unwrap();
        let with = |references: &[String]| ImageFacts { references: references.to_vec(), ..image() };
        assert!(verified.plan(&with(&[format!("registry.example/a@{manifest}")]), &engine()).is_ok());
        assert!(verified.plan(&with(&[format!("registry.example/a@{}", Digest::of(b"other"))]), &engine()).is_err());
        assert!(verified.plan(&with(&[]), &engine()).is_err());
    }

    #[test]
    fn v2_only_a_deploy_request_makes_a_container() {
        let order = order_of(&Identity::generate(), Request::Stop(DeploymentId::random()), Digest::of(b"image"));
        assert_eq!(order.verify().unwrap_err().code, Code::Malformed);
    }
}
