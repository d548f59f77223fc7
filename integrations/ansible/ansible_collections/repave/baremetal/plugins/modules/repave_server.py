#!/usr/bin/python
# Apache-2.0 (see the LICENSE of Repave)

from __future__ import annotations

DOCUMENTATION = """
module: repave_server
short_description: A server that Repave may reinstall
description:
  - Adds, changes, locks and removes a server. Its BMC is asked what it is; nothing is powered or written.
extends_documentation_fragment: repave.baremetal.service
options:
  name: {description: The server's name., type: str, required: true}
  state: {description: Whether it is to be there., type: str, choices: [present, absent], default: present}
  bmc_url: {description: The BMC's URL. Needed for a new server., type: str}
  bmc_username: {description: The BMC's user. Needed for a new server., type: str}
  bmc_password:
    description: The BMC's password. Needed for a new server. The service never shows it, so that of a known server is sent only with O(update_password=always).
    type: str
  update_password:
    description: V(on_create) sends the password for a new server alone; V(always) each time, and the task is then always changed.
    type: str
    choices: [on_create, always]
    default: on_create
  tls_verify: {description: "V(true), V(false) (the certificate seen first is pinned), or a path of a CA bundle on the service's machine.", type: str}
  rack: {description: Its rack., type: str}
  unit: {description: Its rack unit., type: str}
  root_disk: {description: "Which disk may be erased, as in C(serial=S1).", type: str}
  network: {description: "Static settings of its NIC (mac, address, prefix, gateway, dns, vlan); without it DHCP.", type: dict}
  arch: {description: Its architecture., type: str, choices: [amd64, arm64]}
  boot: {description: Its firmware., type: str, choices: [uefi, bios]}
  blank: {description: A new server has no OS yet., type: bool, default: false}
  os_type: {description: The OS that a new server has., type: str, choices: [Linux, Windows], default: Linux}
  image: {description: "The image that a new server's OS was made from, where that is known.", type: str}
  locked: {description: "Whether it is locked, so that nobody reinstalls it; absent = as it is.", type: bool}
  lock_reason: {description: Why., type: str, default: locked by Ansible}
attributes: {check_mode: {support: full, description: Nothing is changed.}}
author: [The Repave authors]
"""

EXAMPLES = """
- repave.baremetal.repave_server:
    name: web01
    bmc_url: https://10.0.0.11
    bmc_username: root
    bmc_password: "{{ bmc_password }}"
    rack: R07
    root_disk: serial=S1
"""

RETURN = """
server: {description: The server as the service shows it; absent where it was removed., type: dict, returned: when it is there}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.repave.baremetal.plugins.module_utils.service import ARGUMENTS, Refused, Service

SETTINGS = ("bmc_url", "bmc_username", "tls_verify", "rack", "unit", "root_disk", "network", "arch", "boot")
NEW = ("bmc_password", "blank", "os_type", "image")


def changes_of(server, params):
    """Which of the settings given differ from what the server has."""
    bmc = server.get("bmc") or {}
    has = {**server, "bmc_url": bmc.get("url"), "bmc_username": bmc.get("username"), "tls_verify": bmc.get("tls_verify")}
    found = {}
    for name in SETTINGS:
        wanted = params[name]
        if wanted is not None and normal(name, wanted) != normal(name, has[name]):
            found[name] = wanted
    return found


def normal(name, value):
    """As both sides would write it."""
    if name == "root_disk":
        if not isinstance(value, dict):
            value = dict(part.strip().split("=", 1) for part in value.split(",") if "=" in part)
        return {key: str(of) for key, of in value.items()}
    if name == "network":
        return {key: str(of).lower() for key, of in (value or {}).items() if of not in (None, [])}
    return str(value).rstrip("/") if name == "bmc_url" else value


def ensure_present(service, module, server):
    params = module.params
    given = {name: params[name] for name in SETTINGS if params[name] is not None}
    if server is None:
        if not params["bmc_url"] or params["bmc_username"] is None or params["bmc_password"] is None:
            module.fail_json(msg="A new server needs bmc_url, bmc_username and bmc_password.")
        if module.check_mode:
            return True, None
        body = {**given, **{name: params[name] for name in NEW if params[name] is not None}, "name": params["name"]}
        return True, service.ask("POST", "/servers", body)
    changes = changes_of(server, params)
    if params["bmc_password"] is not None and (params["update_password"] == "always" or "bmc_url" in changes):
        changes["bmc_password"] = params["bmc_password"]
    if changes and not module.check_mode:
        server = service.ask("PATCH", f"/servers/{params['name']}", changes)
    return bool(changes), server


def ensure_lock(service, module, server):
    wanted = module.params["locked"]
    if wanted is None or server is None or wanted == (server["lock"] is not None):
        return bool(wanted) and server is None, server
    if not module.check_mode:
        path, body = ("lock", {"reason": module.params["lock_reason"]}) if wanted else ("unlock", {})
        server = service.ask("POST", f"/servers/{module.params['name']}/{path}", body)
    return True, server


def main():
    choices = {"state": ["present", "absent"], "update_password": ["on_create", "always"], "os_type": ["Linux", "Windows"]}
    arguments = {
        "name": {"type": "str", "required": True},
        "state": {"type": "str", "choices": choices["state"], "default": "present"},
        "update_password": {"type": "str", "choices": choices["update_password"], "default": "on_create", "no_log": False},
        "bmc_password": {"type": "str", "no_log": True},
        **{name: {"type": "str"} for name in ("bmc_url", "bmc_username", "tls_verify", "rack", "unit", "root_disk", "image")},
        "network": {"type": "dict"},
        "arch": {"type": "str", "choices": ["amd64", "arm64"]},
        "boot": {"type": "str", "choices": ["uefi", "bios"]},
        "blank": {"type": "bool", "default": False},
        "os_type": {"type": "str", "choices": choices["os_type"], "default": "Linux"},
        "locked": {"type": "bool"},
        "lock_reason": {"type": "str", "default": "locked by Ansible"},
    }
    module = AnsibleModule({**ARGUMENTS, **arguments}, supports_check_mode=True)
    service = Service(**{name: module.params[name] for name in ARGUMENTS})
    try:
        server = service.find("servers", module.params["name"])
        if module.params["state"] == "absent":
            if server is not None and not module.check_mode:
                service.ask("DELETE", f"/servers/{server['name']}")
            module.exit_json(changed=server is not None)
        changed, server = ensure_present(service, module, server)
        lock_changed, server = ensure_lock(service, module, server)
    except Refused as refused:
        module.fail_json(msg=str(refused), problem=refused.problem)
    module.exit_json(changed=changed or lock_changed, **({"server": server} if server else {}))


if __name__ == "__main__":
    main()
