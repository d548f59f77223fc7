"""What vendors mean: pure reading of their Redfish JSON, each deviation with its evidence.

Nothing here asks the network. Sources: N field note (reference peers.md 4.1), S sushy's source, B OpenBMC's bmcweb source,
D seen in a capture of the real machine, U engineers' knowledge without a source at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

INSERT = "#VirtualMedia.InsertMedia"
EJECT = "#VirtualMedia.EjectMedia"
RESET = "#ComputerSystem.Reset"

# Words in MessageIds and messages of BMCs that refuse work only for now (lower case).
_BUSY = (
    "servicetemporarilyunavailable", "resourceinuse", "sessionlimitexceeded", "createlimitreached",
    "unabletomodifyduringsystempost",  # iLO during POST (N, bug 2136275)
    "invalidoperationforsystemstate",  # iLO just after a power change (S)
    "sys518",  # iDRAC not ready after the previous operation (S)
    "rac0218",  # iDRAC: no free session (N)
)  # fmt: skip

# MessageIds that say "not this kind of URL" when they are about the image or its protocol (lower case).
_WRONG_VALUE = (
    "valuenotinlist", "valueformaterror", "valuetypeerror", "valueconflict", "valueerror", "parameternotsupported",
)  # fmt: skip

TASK_FAILED = ("Exception", "Killed", "Cancelled", "Failed")  # "Failed" is no standard value; Supermicro says it (D)
_SKIPPED_SLOTS = ("rdoc", "remote")  # Lenovo XCC: slots for its own upload area and remote shares (S)


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def link_of(value: Any) -> str:
    """The target of `{"@odata.id": ...}`, or ""."""
    return as_text(as_dict(value).get("@odata.id"))


def action_of(resource: dict[str, Any], name: str) -> dict[str, Any]:
    return as_dict(as_dict(resource.get("Actions")).get(name))


def is_server(system: dict[str, Any]) -> bool:
    """Whether this ComputerSystem is of a kind that an OS is installed on. DPUs and OS views are listed beside it by some."""
    return as_text(system.get("SystemType")) not in ("DPU", "OS")


def hosts_of(systems: dict[str, dict[str, Any]]) -> list[str]:
    """The URIs of the systems that can be the host; more than one when nothing in the data decides.

    NVIDIA lists `HGX_Baseboard_0` (a GPU board) as Physical and powered on, but it cannot be reset (D, GH200), or can be
    but has no boot override in force (N, DGX).
    """
    left = {uri: s for uri, s in systems.items() if is_server(s)}
    for mark in (
        lambda s: action_of(s, RESET),
        lambda s: as_text(s.get("PowerState")),
        lambda s: "BootSourceOverrideTarget" in as_dict(s.get("Boot")) or s.get("@Redfish.Settings"),
        lambda s: not as_text(s.get("Id")).startswith("HGX_"),
    ):
        if len(left) > 1:
            left = {uri: s for uri, s in left.items() if mark(s)} or left
    return list(left)


def takes_cd(slot: dict[str, Any]) -> bool:
    kinds = [as_text(kind).upper() for kind in as_list(slot.get("MediaTypes"))]
    if any(as_text(slot.get("Id")).lower().startswith(skipped) for skipped in _SKIPPED_SLOTS):
        return False
    return "CD" in kinds or "DVD" in kinds or (not kinds and as_text(slot.get("Id")).upper().startswith(("CD", "DVD")))


def insert_way(slot: dict[str, Any], allow: str | None) -> str:
    """How media get into this slot: "action", "patch" (DMTF, some Lenovo; S) or "" where only the vendor's own way exists.

    `allow` is the Allow header of the slot's GET, None where there was none: then PATCH is tried unless an OEM action is
    named (Huawei and xFusion VmmControl, which take no PATCH; N).
    """
    if action_of(slot, INSERT).get("target"):
        return "action"
    if allow is not None:
        return "patch" if "PATCH" in allow.upper() else ""
    return "" if "VirtualMedia.VmmControl" in str(slot.get("Oem")) else "patch"


def is_occupied(slot: dict[str, Any]) -> bool:
    """Whether media are in the slot. Supermicro keeps ImageName after an eject; ConnectedVia tells the truth (N)."""
    inserted, via = slot.get("Inserted"), slot.get("ConnectedVia")
    if inserted is False or via == "NotConnected":
        return False
    return inserted is True or bool(via) or bool(as_text(slot.get("Image")))


def shows_image(slot: dict[str, Any], url: str) -> bool:
    """Whether the slot holds the image at `url`, as far as this BMC tells: some keep the scheme to themselves, some tell only a name."""
    if not is_occupied(slot):
        return False
    image, name = (unquote(as_text(slot.get(key))).casefold() for key in ("Image", "ImageName"))
    parts = urlsplit(unquote(url).casefold())
    path = parts.netloc + parts.path
    if image:
        bare = image.split("://", 1)[-1].split("?")[0]
        return bare == path or (bare.count("/") > 0 and path.endswith("/" + bare.lstrip("/"))) or bare == path.rsplit("/", 1)[-1]
    file_name = path.rsplit("/", 1)[-1]
    return not name or name in (file_name, file_name.rsplit(".", 1)[0]) or name.split("://")[-1] == path


def shows_image_under(slot: dict[str, Any], folder: str) -> bool | None:
    """Whether the slot holds an image under this part of a path (`/media/RUN/`). None: it tells no path, a bare name or nothing, so nobody can say."""
    told = unquote(as_text(slot.get("Image")) or as_text(slot.get("ImageName"))).casefold()
    if not is_occupied(slot):
        return False
    return folder.casefold() in told if "/" in told else None


def schemes_of(values: Sequence[Any]) -> set[str]:
    """URL schemes for TransferProtocolType values; CIFS and SMB are the same thing."""
    names = {as_text(v).lower() for v in values}
    return names | ({"smb", "cifs"} if names & {"smb", "cifs"} else set())


def cd_target(manufacturer: str, allowed: Sequence[str]) -> str | None:
    """The boot target that means the virtual CD, or None. On Supermicro `Cd` is on offer but does nothing (S)."""
    if "UsbCd" in allowed and (manufacturer.lower().startswith("supermicro") or "Cd" not in allowed):
        return "UsbCd"
    return "Cd" if "Cd" in allowed or not allowed else None


def http_uri(boot: dict[str, Any]) -> str:
    """The URL that UEFI HTTP boot would fetch, or ""."""
    return as_text(boot.get("HttpBootUri"))


def arch_of(*described: dict[str, Any]) -> str:
    """ "amd64", "arm64" or "" from a ProcessorSummary or Processors."""
    text = " ".join(str(d.get(key)) for d in described for key in ("InstructionSet", "ProcessorArchitecture", "Model", "Manufacturer")).lower()
    if any(word in text for word in ("arm", "aarch64", "kunpeng", "ampere", "grace")):
        return "arm64"
    return "amd64" if any(word in text for word in ("x86", "intel", "amd", "xeon", "epyc")) else ""


def refusal_text(error: Any) -> str:
    """All that a refused request was answered, in one lower-case line: ids and messages of sushy's HTTPError."""
    parts = [str(error.code), str(error.detail)]
    for message in as_list(error.extended_info):
        parts += [str(message.get(key)) for key in ("MessageId", "Message", "MessageArgs", "RelatedProperties")]
    return " ".join(parts).lower()


def refusal_slug(error: Any, otherwise: str) -> str:
    """The slug for a refused request (sushy's HTTPError); `otherwise` where the answer tells nothing more precise."""
    text, status = refusal_text(error), error.status_code
    if status == 401 or "passwordchangerequired" in text:
        return "auth"
    if "license" in text or "licence" in text:
        return "no_virtual_media" if otherwise.startswith("media") else "forbidden"
    if status == 403:
        return "forbidden"
    if status in (429, 503) or any(word in text for word in _BUSY):
        return "busy"
    if status in (408, 504):
        return "timeout"
    if otherwise.startswith("media") and status in (404, 405, 501):
        return "no_virtual_media"
    return otherwise


def refuses_protocol(text: str) -> bool:
    """Whether a refusal of InsertMedia says that this kind of URL is not taken."""
    if "filetransferprotocolmismatch" in text:  # iBMC (N)
        return True
    if "resourceaturiinunknownformat" in text:  # bmcweb for a scheme that is not https or smb (B)
        return True
    if any(f"{word} protocol" in text for word in ("unsupported", "invalid", "unknown")) or "protocol is not supported" in text:
        return True
    return any(word in text for word in _WRONG_VALUE) and ("image" in text or "transferprotocol" in text)
