//! Hooks: those that concern the host run there, those that concern the container in the guest.
//!
//! `prestart`, `createRuntime`, `poststart` and `poststop` are programs of the host that look at the
//! host's network namespace: the shim runs them. `createContainer` and `startContainer` run inside what
//! the container sees, which is in the guest; a `createContainer` hook's program is looked up there too.

use oci_spec::runtime::{Hook, Hooks};

use crate::error::{Result, at, invalid};
use crate::plan::{HostHooks, Note, Plan};
use crate::planner::Context;

/// Every kind of hook, as features have it.
pub(crate) const KINDS: &[&str] =
    &["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

pub(crate) fn transform(_: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let Some(mut hooks) = plan.guest.spec.hooks_mut().take() else { return Ok(()) };
    let take = |kind: &str, list: &mut Option<Vec<Hook>>| check(kind, list.take().unwrap_or_default());
    plan.hooks = HostHooks {
        prestart: take("prestart", hooks.prestart_mut())?,
        create_runtime: take("createRuntime", hooks.create_runtime_mut())?,
        poststart: take("poststart", hooks.poststart_mut())?,
        poststop: take("poststop", hooks.poststop_mut())?,
    };
    let create = take("createContainer", hooks.create_container_mut())?;
    let start = take("startContainer", hooks.start_container_mut())?;
    if let Some(hook) = create.first() {
        let text = format!("runs in the guest, where {} is looked up", hook.path().display());
        plan.notes.push(Note::new("hooks.createContainer", text));
    }
    if !create.is_empty() || !start.is_empty() {
        let mut guest = Hooks::default();
        guest.set_create_container((!create.is_empty()).then_some(create));
        guest.set_start_container((!start.is_empty()).then_some(start));
        plan.guest.spec.set_hooks(Some(guest));
    }
    Ok(())
}

fn check(kind: &str, hooks: Vec<Hook>) -> Result<Vec<Hook>> {
    for (index, hook) in hooks.iter().enumerate() {
        let path = at(&format!("hooks.{kind}"), index);
        if !hook.path().is_absolute() {
            return Err(invalid(path, hook.path().display(), "the path of a hook is absolute"));
        }
        if let Some(timeout) = hook.timeout().filter(|timeout| *timeout <= 0) {
            return Err(invalid(path, format!("timeout {timeout}"), "a timeout is at least a second"));
        }
    }
    Ok(hooks)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::Case;

    fn hook(path: &str) -> serde_json::Value {
        json!([{ "path": path }])
    }

    #[test]
    fn each_kind_has_its_side() {
        let all: serde_json::Map<_, _> =
            KINDS.iter().map(|kind| ((*kind).to_owned(), hook(&format!("/{kind}")))).collect();
        let plan = Case::with(&json!({ "hooks": all })).plan();
        let paths = |hooks: &[Hook]| hooks.iter().map(|h| h.path().display().to_string()).collect::<Vec<_>>();
        assert_eq!(paths(&plan.hooks.prestart), ["/prestart"]);
        assert_eq!(paths(&plan.hooks.create_runtime), ["/createRuntime"]);
        assert_eq!(paths(&plan.hooks.poststart), ["/poststart"]);
        assert_eq!(paths(&plan.hooks.poststop), ["/poststop"]);
        let guest = serde_json::to_value(plan.guest.spec.hooks()).unwrap();
        assert_eq!(
            guest,
            json!({ "createContainer": hook("/createContainer"), "startContainer": hook("/startContainer") })
        );
        assert!(plan.notes.iter().any(|note| note.path == "hooks.createContainer"));
    }

    #[test]
    fn hooks_that_make_no_sense() {
        for (hooks, path) in [
            (json!({ "poststop": hook("x") }), "hooks.poststop[0]"),
            (json!({ "startContainer": hook("x") }), "hooks.startContainer[0]"),
            (json!({ "prestart": [{ "path": "/x" }, { "path": "/x", "timeout": 0 }] }), "hooks.prestart[1]"),
        ] {
            assert_eq!(Case::with(&json!({ "hooks": hooks })).error().path(), path);
        }
        assert_eq!(Case::with(&json!({ "hooks": {} })).plan().guest.spec.hooks(), &None);
    }

    #[test]
    fn the_state_for_hooks() {
        let plan = Case::with(&json!({ "annotations": { "a": "b" } })).plan();
        let state = plan.state(oci_spec::runtime::ContainerState::Created, 42);
        let expected = json!({ "ociVersion": "1.1.0", "id": "c1", "status": "created", "pid": 42,
            "bundle": "/bundle", "annotations": { "a": "b" } });
        assert_eq!(serde_json::to_value(state).unwrap(), expected);
    }
}
