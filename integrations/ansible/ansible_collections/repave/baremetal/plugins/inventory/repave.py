# Apache-2.0 (see the LICENSE of Repave)

from __future__ import annotations

DOCUMENTATION = """
name: repave
short_description: The servers of a Repave service
description:
  - One host a server. Groups by rack, model, image and state of its instance; more by C(keyed_groups) and C(groups).
  - The file's name ends in C(repave.yml) or C(repave.yaml).
extends_documentation_fragment:
  - repave.baremetal.service
  - constructed
options:
  plugin: {description: "C(repave.baremetal.repave).", required: true, choices: [repave.baremetal.repave]}
"""

EXAMPLES = """
plugin: repave.baremetal.repave
endpoint: https://repave.example.org:8470
keyed_groups:
  - {key: repave.arch, prefix: arch}
"""

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin, Constructable
from ansible_collections.repave.baremetal.plugins.module_utils.service import Refused, Service


class InventoryModule(BaseInventoryPlugin, Constructable):
    NAME = "repave.baremetal.repave"

    def verify_file(self, path):
        return super().verify_file(path) and path.endswith(("repave.yml", "repave.yaml"))

    def parse(self, inventory, loader, path, cache=True):
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        service = Service(**{name: self.get_option(name) for name in ("endpoint", "token", "ca_path", "project")})
        try:
            servers = service.list("servers")
        except Refused as refused:
            raise AnsibleParserError(f"{path}: {refused}") from None
        for server in servers:
            self._add(server)

    def _add(self, server):
        host = self.inventory.add_host(server["name"])
        shown = {name: value for name, value in server.items() if name != "bmc"}
        self.inventory.set_variable(host, "repave", shown)
        if server["network"]:
            self.inventory.set_variable(host, "ansible_host", server["network"]["address"])
        instance = server["instance"]
        named = {"rack": server["rack"], "model": server["model"], "image": instance["image"], "state": instance["state"]}
        for kind, value in named.items():
            if value:
                group = self.inventory.add_group(self._sanitize_group_name(f"repave_{kind}_{value}"))
                self.inventory.add_child(group, host)
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), {"repave": shown}, host, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), {"repave": shown}, host, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), {"repave": shown}, host, strict=strict)
