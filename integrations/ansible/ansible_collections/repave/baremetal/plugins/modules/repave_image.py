#!/usr/bin/python
# Apache-2.0 (see the LICENSE of Repave)

from __future__ import annotations

DOCUMENTATION = """
module: repave_image
short_description: An image that Repave writes to servers
description:
  - Imports an image under a name, or removes it. An image that is there is never replaced; a new version is a new name.
extends_documentation_fragment: repave.baremetal.service
options:
  name: {description: The image's name., type: str, required: true}
  state: {description: Whether it is to be there., type: str, choices: [present, absent], default: present}
  src: {description: The image file on the machine that the task runs on., type: path}
  url: {description: "Where the service fetches it; O(sha256) or O(signature_url) is needed with it.", type: str}
  path: {description: A file below the service's import_dir., type: str}
  sha256: {description: The file's SHA-256., type: str}
  signature_url: {description: A detached OpenPGP signature., type: str}
  os_type: {description: Its OS., type: str, choices: [Linux, Windows], default: Linux}
  arch: {description: Its architecture., type: str, choices: [amd64, arm64], default: amd64}
  timeout: {description: Seconds that the import may take., type: int, default: 21600}
attributes: {check_mode: {support: full, description: Nothing is changed.}}
author: [The Repave authors]
"""

EXAMPLES = """
- repave.baremetal.repave_image:
    name: debian-12-20261101
    url: https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-generic-amd64.qcow2
    sha256: "{{ debian_sha256 }}"
"""

RETURN = """
image: {description: The image as the service shows it., type: dict, returned: when it is there}
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.repave.baremetal.plugins.module_utils.service import ARGUMENTS, Refused, Service


def add_image(service, params):
    about = {"name": params["name"], "os_type": params["os_type"], "arch": params["arch"]}
    if params["src"]:
        headers = {"Content-Type": "application/octet-stream", **({"X-Repave-SHA256": params["sha256"]} if params["sha256"] else {})}
        with open(params["src"], "rb") as file:
            headers["Content-Length"] = str(os.fstat(file.fileno()).st_size)
            return service.ask("POST", "/images", file, headers, params["timeout"], **about)
    source = {name: params[name] for name in ("url", "path", "sha256", "signature_url") if params[name]}
    return service.ask("POST", "/images", {"source": source}, None, params["timeout"], **about)


def main():
    arguments = {
        "name": {"type": "str", "required": True},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "src": {"type": "path"},
        **{name: {"type": "str"} for name in ("url", "path", "sha256", "signature_url")},
        "os_type": {"type": "str", "choices": ["Linux", "Windows"], "default": "Linux"},
        "arch": {"type": "str", "choices": ["amd64", "arm64"], "default": "amd64"},
        "timeout": {"type": "int", "default": 21600},
    }
    module = AnsibleModule({**ARGUMENTS, **arguments}, supports_check_mode=True, mutually_exclusive=[("src", "url", "path")])
    params = module.params
    service = Service(**{name: params[name] for name in ARGUMENTS})
    try:
        image = service.find("images", params["name"])
        changed = (image is None) is (params["state"] == "present")
        if params["state"] == "present" and image is None:
            if not (params["src"] or params["url"] or params["path"]):
                module.fail_json(msg="A new image needs src, url or path.")
            image = None if module.check_mode else add_image(service, params)
        elif params["state"] == "absent" and image is not None and not module.check_mode:
            service.ask("DELETE", f"/images/{image['id']}")
            image = None
    except Refused as refused:
        module.fail_json(msg=str(refused), problem=refused.problem)
    except OSError as error:
        module.fail_json(msg=f"{params['src']}: {error.strerror}")
    module.exit_json(changed=changed, **({"image": image} if image else {}))


if __name__ == "__main__":
    main()
