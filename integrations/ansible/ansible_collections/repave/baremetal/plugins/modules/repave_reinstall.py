#!/usr/bin/python
# Apache-2.0 (see the LICENSE of Repave)

from __future__ import annotations

DOCUMENTATION = """
module: repave_reinstall
short_description: Erases servers and installs an image on them
description:
  - Servers that run the image already are left alone, unless O(force) is set. So the task may be run again.
  - In check mode the service answers its plan, and nothing is begun.
extends_documentation_fragment: repave.baremetal.service
options:
  servers: {description: Names of servers. Empty never means all., type: list, elements: str, required: true}
  image: {description: Name or id of the image., type: str, required: true}
  password: {description: "The new administrator's password.", type: str, required: true}
  ssh_keys: {description: Public keys for the new OS., type: list, elements: str, default: []}
  user_data: {description: cloud-init's user data., type: str, default: ""}
  each:
    description: What differs for some of the servers.
    type: list
    elements: dict
    default: []
    suboptions:
      server: {description: Which of O(servers)., type: str, required: true}
      image: {description: Its image., type: str}
      password: {description: Its password., type: str}
      ssh_keys: {description: Its public keys., type: list, elements: str}
      user_data: {description: Its user data., type: str}
      hostname: {description: The host name of its new OS., type: str}
  force: {description: Also servers that run the image., type: bool, default: false}
  canary: {description: So many go first., type: int}
  at_once: {description: So many at once., type: int}
  max_failed: {description: Stop where more have failed., type: int}
  idempotency_key:
    description: Under which the service keeps its answer for a day, so that a request whose answer was lost begins nothing twice.
    type: str
  wait: {description: Until the batch has ended; the task fails where a run did., type: bool, default: true}
  wait_timeout: {description: Seconds to wait at most., type: int, default: 7200}
attributes: {check_mode: {support: full, description: The plan is answered.}}
author: [The Repave authors]
"""

EXAMPLES = """
- repave.baremetal.repave_reinstall:
    servers: "{{ groups.web }}"
    image: debian-12-20261101
    password: "{{ new_password }}"
    canary: 1
    max_failed: 1
  run_once: true
  delegate_to: localhost
"""

RETURN = """
plan: {description: What would be erased and kept., type: dict, returned: in check mode}
batch: {description: The batch with its runs., type: dict, returned: when one was begun}
"""

import time
import uuid

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.repave.baremetal.plugins.module_utils.service import ARGUMENTS, Refused, Service

TRIES, PAUSE_S = 3, 5
OWN = {
    "server": {"type": "str", "required": True},
    "image": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "ssh_keys": {"type": "list", "elements": "str", "no_log": False},
    "user_data": {"type": "str", "no_log": True},
    "hostname": {"type": "str"},
}


def list_wanted(service, params):
    """The servers that do not run the image they are to have."""
    ids, wanted = {}, []
    images = {own["server"]: own["image"] for own in params["each"] if own["image"]}
    for name in params["servers"]:
        image = images.get(name, params["image"])
        if image not in ids:
            ids[image] = service.ask("GET", f"/images/{image}")["id"]
        instance = service.ask("GET", f"/servers/{name}")["instance"]
        if params["force"] or instance["state"] != "running" or instance["image_id"] != ids[image]:
            wanted.append(name)
    return wanted


def begin(service, body, key):
    """Sent again where no answer came: its key makes that harmless."""
    for number in range(1, TRIES + 1):
        try:
            return service.ask("POST", "/reinstall", body, {"Idempotency-Key": key})
        except Refused as refused:
            if number == TRIES or refused.status not in (0, 502, 503):
                raise
        time.sleep(PAUSE_S)
    raise AssertionError


def wait_for_end(service, batch, seconds):
    """The batch as it is at its end, or when the time is over. A service that is away for a while is asked again."""
    deadline, pause_s = time.monotonic() + seconds, 1
    while batch["state"] == "working" and time.monotonic() < deadline:
        time.sleep(pause_s)
        pause_s = min(pause_s + 1, 15)
        try:
            batch = service.ask("GET", f"/batches/{batch['id']}")
        except Refused as refused:
            if refused.status not in (0, 429, 502, 503):
                raise
    return batch


def main():
    arguments = {
        "servers": {"type": "list", "elements": "str", "required": True},
        "image": {"type": "str", "required": True},
        "password": {"type": "str", "required": True, "no_log": True},
        "ssh_keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
        "user_data": {"type": "str", "default": "", "no_log": True},
        "each": {"type": "list", "elements": "dict", "default": [], "options": OWN},
        "force": {"type": "bool", "default": False},
        **{name: {"type": "int"} for name in ("canary", "at_once", "max_failed")},
        "idempotency_key": {"type": "str", "no_log": False},
        "wait": {"type": "bool", "default": True},
        "wait_timeout": {"type": "int", "default": 7200},
    }
    module = AnsibleModule({**ARGUMENTS, **arguments}, supports_check_mode=True)
    params = module.params
    service = Service(**{name: params[name] for name in ARGUMENTS})
    try:
        wanted = list_wanted(service, params)
        if not wanted:
            module.exit_json(changed=False)
        body = {name: params[name] for name in ("image", "password", "ssh_keys", "user_data", "canary", "at_once", "max_failed") if params[name] is not None}
        own = {of["server"]: {name: value for name, value in of.items() if name != "server" and value is not None} for of in params["each"]}
        body.update(servers=wanted, each={name: of for name, of in own.items() if name in wanted})
        if module.check_mode:
            plan = service.ask("POST", "/reinstall", body, dry_run="true")
            if plan["problems"]:
                module.fail_json(msg="; ".join(f"{p['server']}: {p['title']} {p['cause']}" for p in plan["problems"]), plan=plan)
            module.exit_json(changed=True, plan=plan)
        batch = begin(service, body, params["idempotency_key"] or str(uuid.uuid4()))
        if params["wait"]:
            batch = wait_for_end(service, batch, params["wait_timeout"])
    except Refused as refused:
        module.fail_json(msg=str(refused), problem=refused.problem)
    if params["wait"] and batch["state"] != "succeeded":
        bad = [
            f"{run['server']}: {run['state']}" + (f", {run['error']['title']}" if run["error"] else "") for run in batch["runs"] if run["state"] != "running"
        ]
        module.fail_json(msg=f"Batch {batch['id']} is {batch['state']}: {'; '.join(bad)}", changed=True, batch=batch)
    module.exit_json(changed=True, batch=batch)


if __name__ == "__main__":
    main()
