"""Every error Repave raises on purpose, sorted by who must act.

One table, `CATALOGUE`, holds what is known of each code: docs/errors.md, `repave explain`, the wire and the pages read it.
An error object adds only what happened this time (`detail`). Texts for clients never hold BMC addresses, paths or SQL.

Codes: 1 request, 2 BMC, 3 server and disk, 4 image, 5 new OS, 9 us.
"""

# ruff: noqa: E501
from __future__ import annotations

import enum
from typing import Any, NamedTuple


class Who(enum.StrEnum):
    """Who must act."""

    REQUEST = "request"
    BMC = "bmc"
    SERVER = "server"
    IMAGE = "image"
    NEW_OS = "new-os"
    US = "repave"


class Problem(NamedTuple):
    """What is known of one code, whatever the case at hand."""

    code: str
    slug: str
    title: str
    cause: str
    do: str
    untouched: str
    who: Who
    retryable: bool


def _table(*rows: tuple[str, str, Who, bool, str, str, str, str]) -> dict[str, Problem]:
    return {
        slug: Problem(f"Repave.{number}", slug, title, cause, do, untouched, who, retryable)
        for number, slug, who, retryable, title, cause, do, untouched in rows
    }


_NOTHING = "the server was not powered and not written"
_DISK = "the root disk was not written"
_ERASED = "data disks; the root disk is erased and cannot boot by design"

# fmt: off
CATALOGUE: dict[str, Problem] = _table(
    # 1: request
    ("1001", "bad-request", Who.REQUEST, False, "The request is not valid.", "A field has a value that is not allowed.", "Correct the field that is named.", "everything"),
    ("1002", "not-found", Who.REQUEST, False, "Not found.", "The name or id is not known in this project.", "See what there is: repave server ls, image ls, batch ls, key ls.", "everything"),
    ("1003", "conflict", Who.REQUEST, False, "It exists already, or is in use.", "The name or id is taken, or a run needs it.", "Choose another name, or wait for the run to end.", "everything"),
    ("1004", "not-allowed", Who.REQUEST, False, "This key may not do that.", "The key's role or project does not allow it.", "Use a key with the role named, or ask an admin.", "everything"),
    ("1005", "not-logged-in", Who.REQUEST, False, "Who you are is not known.", "No token or signature, or one that is not valid.", "Set REPAVE_TOKEN, or run repave init on the server.", "everything"),
    ("1006", "in-progress", Who.REQUEST, True, "A reinstall of this server is under way.", "An earlier batch has not ended.", "repave batch watch", "this request started nothing"),
    ("1007", "locked", Who.REQUEST, False, "The server is locked.", "Someone locked it, so that nobody reinstalls it by mistake.", "Leave it out, or ask who locked it: repave server show NAME; then repave server unlock NAME.", "everything"),
    ("1008", "own-host", Who.REQUEST, False, "Repave itself runs on this server.", "Its serial number, UUID or a MAC address is that of a machine Repave runs on.", "Leave it out; move Repave elsewhere first.", "everything"),
    ("1009", "past-the-line", Who.REQUEST, False, "It is past the line: stopping would leave half a system.", "The old OS is being overwritten, or is gone.", "Let it finish: repave watch. Then reinstall it with the image you want.", "data disks"),
    ("1010", "cancelled", Who.REQUEST, False, "The reinstall was cancelled.", "Someone cancelled it before the line.", "Nothing; or repave batch retry.", _DISK),
    ("1011", "batch-stopped", Who.REQUEST, False, "The batch was stopped by its own limit.", "More runs failed than its limit allows, or a canary did not go well.", "Read why the others failed; then repave batch retry.", _DISK),
    ("1012", "too-many", Who.REQUEST, True, "This key asks too often.", "It sent more requests a second than rate_per_s and rate_burst allow.", "Wait as long as Retry-After says, then send it again.", "this request started nothing"),
    ("1013", "no-route", Who.REQUEST, False, "There is no such path, or it takes another method.", "Wrong path, letter case, slash or method.", "Compare it with docs/api.md.", "everything"),
    ("1030", "key-used", Who.REQUEST, False, "This Idempotency-Key came with another request.", "A key stands for one request, for a day.", "Send the first request again as it was, or this one with a new key.", "everything; the first request's batch goes on"),
    ("1031", "webhook-failed", Who.REQUEST, True, "The webhook was not taken.", "The receiver can not be reached, or does not answer 2xx.", "Look at the receiver; then repave webhook test NAME.", "everything"),
    # 2: BMC. The slugs are the closed set that `repave bmc --json` prints as error.class.
    ("2101", "unreachable", Who.BMC, True, "The BMC does not answer.", "No connection, or none in time.", "Check cable, address and port; repave bmc probe URL.", _DISK),
    ("2102", "tls", Who.BMC, False, "The BMC's certificate is not the one we trust.", "It is not the pinned one, or TLS failed.", "Compare fingerprints, then repave server set NAME --repin.", "no password was sent"),
    ("2103", "auth", Who.BMC, False, "The BMC refuses user name or password.", "Wrong or expired credentials, or a locked account.", "Correct them; of a server that is there already: repave server set NAME --user USER --password-stdin.", _DISK),
    ("2104", "forbidden", Who.BMC, False, "The BMC account may not do that.", "The account lacks a privilege or licence.", "Give the account the Operator or Administrator role.", _DISK),
    ("2105", "not_redfish", Who.BMC, False, "The address does not speak Redfish.", "The answer is not a Redfish service root.", "Check the address; enable Redfish in the BMC.", _NOTHING),
    ("2106", "no_system", Who.BMC, False, "The BMC names no server.", "No ComputerSystem of the kind we reinstall.", "Check the address: is it a chassis manager?", _NOTHING),
    ("2107", "ambiguous_system", Who.BMC, False, "The BMC names several servers.", "More than one ComputerSystem could be the host.", "repave server set NAME --system URI.", _NOTHING),
    ("2108", "no_virtual_media", Who.BMC, False, "The BMC has no virtual CD.", "No virtual media slot that takes a CD, or no licence.", "Enable virtual media; a licence may be needed. Or uefi_http_boot in the settings.", _NOTHING),
    ("2109", "media_protocol", Who.BMC, False, "The BMC can not fetch our media by this protocol.", "None of the URLs has a protocol that it takes.", "Set media_https_listen and name it in media_url, or name another protocol there.", _DISK),
    ("2111", "media_rejected", Who.BMC, True, "The BMC refused our media.", "InsertMedia was answered with an error.", "Read the detail; can the BMC reach media_url?", _DISK),
    ("2112", "media_not_inserted", Who.BMC, True, "The media are not in the drive.", "InsertMedia was accepted, but reading back shows an empty or another drive.", "Can the BMC reach media_url? Then retry.", _DISK),
    ("2113", "boot_override_rejected", Who.BMC, True, "The BMC refused the one-time boot order.", "The boot override was answered with an error.", "Set UEFI mode in the firmware; retry.", _DISK),
    ("2110", "boot_override_ignored", Who.BMC, True, "The server did not boot our media.", "The one-time boot order was accepted and ignored, or the ramdisk did not come up.", "Look at the console; set UEFI mode in the firmware; retry.", _DISK),
    ("2114", "power_failed", Who.BMC, True, "The power state did not change.", "Reading back shows another state than was asked for.", "Look at the server; retry.", _DISK),
    ("2115", "busy", Who.BMC, True, "The BMC is busy.", "It refuses work for now, or has no free login.", "Wait a minute, then retry.", _DISK),
    ("2116", "timeout", Who.BMC, True, "The BMC took too long.", "An answer or a task did not end in time.", "Retry; reset the BMC if it stays so.", _DISK),
    ("2117", "protocol", Who.BMC, False, "The BMC gave an answer that makes no sense.", "Malformed, too large, too deep, or from elsewhere.", "Update its firmware; send us the answer.", _DISK),
    ("2118", "password_refused", Who.BMC, False, "The BMC does not take this password.", "Its rules want another length or other characters, or it was used before.", "Choose another one; the old one is in force.", _NOTHING),
    # 3: server and disk
    ("3101", "no-root-disk", Who.SERVER, False, "No disk can be the root disk.", "No candidate: removable, virtual and read-only disks do not count.", "Check the disks; repave server set NAME --root-disk.", "all disks"),
    ("3102", "ambiguous-root-disk", Who.SERVER, False, "Several disks could be the root disk.", "No recorded serial, hint or boot entry decides.", "repave server set NAME --root-disk serial=SERIAL.", "all disks"),
    ("3103", "wrong-server", Who.SERVER, False, "This is another server than the one we know.", "Serial, UUID or MAC addresses differ.", "A run that met it has locked the server. Check cabling and address; then repave server unlock, or after a board swap repave server replace.", "all disks where it was found before the line, else see the run"),
    ("3104", "disk-too-small", Who.SERVER, False, "The root disk is smaller than the image.", "The image needs more bytes than the disk has.", "Choose a smaller image or another disk.", "all disks"),
    ("3105", "sector-size", Who.SERVER, False, "Image and disk have different sector sizes.", "The image is made for other logical sectors.", "Use an image made for the disk's sector size (repave image ls shows it).", "all disks"),
    ("3106", "arch-mismatch", Who.SERVER, False, "The image is for another architecture.", "Server and image differ in arch or boot mode.", "Use an image for this architecture and boot mode.", _NOTHING),
    ("3107", "disk-write", Who.SERVER, True, "The root disk refused a write.", "The kernel reported an I/O error.", "Replace the disk, then retry.", _ERASED),
    ("3108", "agent-silent", Who.SERVER, True, "The ramdisk stopped reporting.", "No word from the agent within its lease.", "Look at the console; retry.", _ERASED),
    ("3109", "read-back", Who.SERVER, True, "The disk gave back other bytes than were written.", "Read-back after the flush differs.", "Replace the disk, then retry.", _ERASED),
    ("3110", "disk-changed", Who.SERVER, False, "The disk is not the one in the plan.", "Serial or size changed between plan and write.", "Check the disks, then retry.", "all disks"),
    ("3113", "kept-partition", Who.SERVER, False, "A partition that is to be kept can not be.", "The root disk has no such partition, or two, or it is in the image's way.", "Look: repave server show NAME; then repave server set NAME --keep-partitions NAMES, or '' to keep none.", "all disks"),
    ("3112", "second-agent", Who.SERVER, True, "Its ramdisk was started twice.", "Another boot showed this run's token: the server reset itself, or something else has its boot media.", "Look at the console, and at who can read its boot media; then retry.", _DISK),
    ("3111", "agent-failed", Who.SERVER, True, "The ramdisk met an error.", "The agent reported a failure.", "Read the detail; retry.", _DISK),
    # 4: image
    ("4101", "image-refused", Who.IMAGE, False, "This file is refused as an image.", "Of a format that image_formats does not allow, or it refers to other files, is damaged or too large, is not what was announced, or changed while it was read.", "Read the detail; import a whole copy, or convert it: qemu-img convert -O qcow2.", "everything"),
    ("4102", "image-damaged", Who.IMAGE, False, "The stored image is damaged.", "A chunk is missing or has another digest than its manifest.", "Import the image again.", "see the run: found before or after the line"),
    ("4103", "image-missing", Who.IMAGE, False, "The image is not there.", "It was removed, or never imported.", "repave image ls; repave image import FILE.", _NOTHING),
    ("4104", "image-quota", Who.IMAGE, False, "The image store is full.", "The quota or the disk would be passed.", "repave image rm IMAGE, or raise images_quota_bytes.", "everything"),
    # 5: new OS
    ("5001", "blank", Who.NEW_OS, False, "There is no OS yet.", "The server was added with --blank.", "Reinstall it: repave reinstall NAME --image IMAGE.", "everything"),
    ("5101", "no-proof", Who.NEW_OS, True, "The new OS did not prove itself.", "It did not start, has no network, or cloud-init did not run.", "Look at the console; the image is on the disk.", "data disks; the image on the root disk is verified"),
    ("5102", "wrong-disk-booted", Who.NEW_OS, False, "Another disk booted than the one we wrote.", "The proof names another root disk.", "Correct the boot order in the firmware.", "data disks"),
    # 9: us
    ("9001", "internal", Who.US, True, "Repave made a mistake.", "An error that nobody foresaw.", "Send us the request id and the log.", "see the run"),
    ("9002", "deadline", Who.US, True, "It took too long.", "The deadline of this step passed.", "Look at the console; retry.", "see the run"),
    ("9003", "password-gone", Who.US, False, "The password of this run is gone.", "Its key was destroyed when the run ended.", "Send the reinstall again.", _NOTHING),
    ("9004", "restore-failed", Who.US, True, "The old OS could not be powered on again.", "Before the line; reading back did not show power on.", "Power the server on; its disk is untouched.", "the root disk was not written"),
    ("9005", "service-unreachable", Who.US, True, "The service does not answer.", "It is not running, or the address is wrong.", "repave serve, or set REPAVE_ENDPOINT.", "everything"),
    ("9010", "answer-lost", Who.US, True, "Whether it has begun is not known.", "The request was sent again and again, and no answer came back.", "repave batch ls shows whether it has; if not, ask again.", "not known: look at repave batch ls"),
    ("9030", "order-cut-short", Who.US, True, "The order was cut short.", "Repave is stopping, or had no hold on its database for a while: it sends nothing to a BMC then.", "repave server power NODESET show; then give the order again.", "all disks; the power may be half way: a restart may have left the server off"),
    ("9031", "service-ending", Who.US, True, "Repave is stopping.", "It was told to end while this waited or was under way.", "Send it again when the service is up.", "everything"),
    ("9006", "stale-run", Who.US, False, "This run is over.", "Another run, or the end of this one, came first.", "Nothing; look at repave batch ls.", "everything"),
    ("9007", "database-newer", Who.US, False, "The database was made by a newer version of Repave.", "Its tables have a revision that this program does not know.", "Run that version, or restore the backup from before the upgrade.", "everything"),
    ("9020", "restored", Who.US, False, "A backup was restored while this run was under way in it.", "What the run did after the backup was made is not known. It was ended, and its server left as it is.", "Look at the server; then reinstall it.", "not known: look at the server"),
    ("9021", "old-state", Who.US, False, "The database is older than this site.", "An earlier copy was put back. A run in it may have ended since, and would wipe its server again.", "repave restore FILE; or, to go on with this database: repave restore --accept-database. Its live runs end, no server is touched.", "everything"),
    ("9022", "restore-unfinished", Who.US, False, "A restore was begun and did not finish.", "It was interrupted: what is here may be half of each.", "Run the same repave restore FILE again.", "everything"),
    ("9023", "backup-refused", Who.REQUEST, False, "This backup can not be used.", "It is damaged, or no backup of ours.", "Use another backup; repave restore checks before it replaces anything.", "everything"),
    ("9024", "database-unavailable", Who.US, True, "The database can not be used now.", "Its disk is full, it is read-only, locked or away.", "Look at /repave/v1/health and the log, make room; then retry.", "this request started nothing"),
    ("9025", "database-corrupt", Who.US, False, "The database is damaged.", "Its own check found pages that make no sense.", "repave restore FILE, with the newest backup; keep the damaged file.", "everything"),
    ("9026", "upgrade-unfinished", Who.US, False, "Runs of another version are under way.", "A run ends in the version of the workflow it began in, and no worker of that version is left.", "Start the version from before and let its runs end (repave batch ls); then upgrade.", "everything"),
    ("9027", "audit-broken", Who.US, False, "The audit is not as it was written.", "An event was changed, added or removed in the database by something that has not the key file.", "Find out who can write in the database; compare the events around it with a backup's.", "everything"),
    ("9029", "chunks-unreachable", Who.US, True, "The server can not fetch the image's chunks.", "chunks_url leads nowhere from the server's network, is another site's, or does not take the run's token.", "Look at chunks_url, chunks_listen and the firewall between; retry.", "all disks"),
    ("9028", "loopback-address", Who.US, False, "The server can not reach Repave.", "media_url, agent_url or chunks_url is a loopback address: BMC and server would look for us in themselves.", "Set media_url and agent_url (and chunks_url, where it is set) to an address of ours that BMCs and servers reach, then start repave serve again: README.md.", _NOTHING),
    ("9008", "not-this-site", Who.US, False, "This service does not fit the database.", "The key file, CA or a shared folder is not the one that the database was begun with.", "Give it the same secret folder and image folder as the other workers: docs/operations.md.", "everything"),
)
# fmt: on

# What CloudDC's codes, which its routes answer with (api/wire_errors.py), are among ours.
CLOUDDC: dict[str, tuple[str, ...]] = {
    "iMetal.0001": ("bad-request",), "iMetal.0002": ("bad-request",), "iMetal.0003": ("not-logged-in",), "iMetal.0004": ("not-allowed",),
    "iMetal.0005": ("too-many",), "iMetal.0099": ("internal", "database-unavailable", "database-corrupt"), "iMetal.0100": ("not-found",),
    "iMetal.0101": ("locked", "own-host"), "iMetal.0200": ("not-found",), "iMetal.0201": ("in-progress",),
    "APIGW.0101": ("no-route",), "APIGW.0201": ("bad-request",),
}  # fmt: skip

BMC_CLASSES = tuple(slug for slug, p in CATALOGUE.items() if p.who is Who.BMC)


class RepaveError(Exception):
    """Base of every error raised on purpose: a row of the catalogue and what happened this time.

    `context` holds JSON values only (field, ids, step, ...). `str(error)` is fit for a client: title, then detail.
    """

    def __init__(self, slug: str, detail: str = "", **context: Any) -> None:
        self.problem = CATALOGUE[slug]
        self.detail = detail
        self.context = context
        super().__init__(f"{self.problem.title} {detail}".strip())

    @property
    def code(self) -> str:
        return self.problem.code

    @property
    def slug(self) -> str:
        return self.problem.slug

    @property
    def retryable(self) -> bool:
        return self.problem.retryable

    def as_json(self) -> dict[str, Any]:
        """The shape of an error in our API, CLI and database (docs/api.md)."""
        p = self.problem
        return {
            "code": p.code, "class": p.slug, "title": p.title, "cause": self.detail or p.cause, "who": p.who.value,
            "retryable": p.retryable, "untouched": p.untouched, "do": p.do,
        } | ({"context": self.context} if self.context else {})  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RepaveError:
        """The error that `as_json` rendered, with its class again: what a recorded step failure becomes after a restart."""
        kind = {"BmcError": BmcError}.get(value.get("type", ""), cls)
        return kind(value["class"], value.get("cause", ""), **value.get("context", {}))


class RunFailed(RepaveError):
    """A step of a run failed on purpose; the workflow catches this and nothing wider."""


class BmcError(RunFailed):
    """The BMC did not do what was asked, or could not be asked. `slug` is one of BMC_CLASSES."""


class DeadlinePassed(RunFailed):
    """A wait or a step took longer than its deadline."""


class ImageError(RunFailed):
    """An image is refused, missing or damaged."""


class RequestError(RepaveError):
    """The client must correct its request; nothing was done."""
