"""Settings: one documented TOML file and the environment (REPAVE_<NAME>), the environment first. Typos in either are refused."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from repave.domain.urls import find_url_fault
from repave.errors import RepaveError

SETTINGS_FILE = "repave.toml"
ENV_PREFIX = "REPAVE_"
OTHER_VARIABLES = frozenset((
    "REPAVE_SITE", "REPAVE_ENDPOINT", "REPAVE_TOKEN", "REPAVE_CA", "REPAVE_NEW_PASSWORD", "REPAVE_NETBOX_TOKEN",  # the command line
    "REPAVE_CONTEXT", "REPAVE_PROGRESS", "REPAVE_QUIET", "REPAVE_NEW_BMC_PASSWORD",
    "REPAVE_BMC_USERNAME", "REPAVE_BMC_PASSWORD", "REPAVE_BMC_TLS_VERIFY",
    "REPAVE_CACHE", "REPAVE_DEMO_IMAGE", "REPAVE_SSH_PASSWORD",  # the ramdisk's builder and the lab
    "REPAVE_REDFISH_CORPUS", "REPAVE_KEEP", "REPAVE_PICTURES",  # tests
))  # fmt: skip
_LISTEN = r"^\S+:\d{1,5}$"  # HOST:PORT
_LISTEN_OR_NONE = rf"^$|{_LISTEN}"


class Settings(BaseSettings):
    """Everything that can be set. `repave init` writes the file; docs/settings.md is generated from here."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid")

    data_dir: Path = Field(default=Path("repave-data"), description="Database, images, boot media. Relative paths count from the settings file.")
    images_dir: Path | None = Field(default=None, description="The image store; empty = data_dir/images. Several workers share it.")
    key_file: Path = Field(
        default=Path("secret/key"),
        description="The key that seals secrets (0600); CA and live runs' keys lie beside it. Keep it out of the database's backups. Several workers share it.",
    )
    database_url: str = Field(default="", description="SQLAlchemy URL; empty = SQLite in data_dir. PostgreSQL: postgresql+psycopg://...")
    worker_beat_s: float = Field(default=5, gt=0, description="PostgreSQL: seconds between two renewals of a worker's lease, and looks for dead workers.")
    worker_fence_s: float = Field(default=20, gt=0, description="A worker that could not renew so long does nothing on a server until it has renewed.")
    worker_lease_s: float = Field(default=30, gt=0, description="A worker that has not renewed so long is dead; others take over its runs.")
    api_listen: str = Field(
        default="127.0.0.1:8470", pattern=_LISTEN, description="API and pages. Plain HTTP on loopback only; otherwise api_certificate is needed."
    )
    api_certificate: Path | None = Field(default=None, description="PEM file with certificate chain and key for the API.")
    provisioning_listen: str = Field(default="127.0.0.1:8471", pattern=_LISTEN, description="Agents and new operating systems, TLS with our own CA.")
    media_listen: str = Field(default="127.0.0.1:8472", pattern=_LISTEN, description="Boot media for BMCs, plain HTTP, a path that can not be guessed.")
    media_https_listen: str = Field(
        default="",
        pattern=_LISTEN_OR_NONE,
        description="The same media by HTTPS, for BMCs that take nothing else; empty = not served. Name it in media_url too.",
    )
    media_certificate: Path | None = Field(
        default=None, description="PEM file with certificate chain and key for it; empty = one by our own CA, for BMCs that check none or were given ca.pem."
    )
    media_url: str = Field(
        default="http://127.0.0.1:8472", description="The media listeners as BMCs see them, separated by blanks; a BMC gets the first that it can fetch."
    )
    agent_url: str = Field(default="https://127.0.0.1:8471", description="The provisioning listener as servers see it.")
    chunks_listen: str = Field(
        default="127.0.0.1:8473",
        pattern=_LISTEN_OR_NONE,
        description="Chunks of images for agents, TLS with our own CA, served by a process of its own; empty = not served here, but at chunks_url.",
    )
    chunks_url: str = Field(
        default="", description="Where servers fetch chunks, https://HOST[:PORT]/PATH with PATH/ab/SHA256; empty = agent_url's host, chunks_listen's port."
    )
    chunk_caches: str = Field(
        default="",
        description="HTTP caches of chunks_url, separated by blanks, asked before it: URL for all servers, RACK=URL for those of one rack (%20 for a blank).",
    )
    boot_iso: Path | None = Field(default=None, description="The boot media's ISO; empty = data_dir/boot.iso, built when missing.")
    uefi_http_boot: Literal["never", "where-needed", "always"] = Field(
        default="never", description="UEFI HTTP boot where a BMC has no virtual media, or always; firmware must reach media_url (docs/operations.md: the risk)."
    )
    nic_firmware: bool = Field(default=False, description="Boot media with NICs that need firmware files; apt must know Debian's non-free-firmware.")
    cache_dir: Path | None = Field(default=None, description="Where packages for the ramdisk are kept; empty = data_dir/cache.")
    graceful_s: float = Field(default=60, ge=0, le=3600, description="Seconds an OS gets to shut down before power is cut.")
    agent_ready_s: float = Field(default=30 * 60, gt=0, description="Seconds at most from power on until the ramdisk must have said hello; less is learnt.")
    written_s: float = Field(default=24 * 3600, gt=0, description="Seconds from the plan until the image must be written and verified, however well it moves.")
    proof_s: float = Field(default=30 * 60, gt=0, description="Seconds at most from power on until the new OS must have called home; less is learnt.")
    read_back: Literal["sample", "all"] = Field(
        default="sample", description="How much of what was written is read again, past the cache: the start of every piece and 5 % whole, or all of it."
    )
    forward_pause_s: float = Field(default=10, gt=0, description="Seconds between two tries of inserting media or of booting from them, four in all.")
    return_pause_s: float = Field(default=60, gt=0, description="Seconds between two tries of giving a server back or of switching it off, four in all.")
    media_sweep_s: float = Field(default=300, gt=0, description="Seconds between two looks for boot media that were left in drives because a BMC was away.")
    reinstall_timeout_s: float = Field(
        default=3 * 3600 + 1800, gt=0, description="No run moves forward past this; a write that moves has an hour more from each word of it."
    )
    waiting_timeout_s: float = Field(default=24 * 3600, gt=0, description="A run that has not begun so long after its 202 ends, its server untouched.")
    batch_max: int = Field(default=50, gt=0, le=50, description="Instances one request may name; CloudDC allows 50.")
    runs_at_once: int = Field(default=200, gt=0, description="Runs under way at once in the whole site; the others wait.")
    rack_at_once: int = Field(default=0, ge=0, description="Runs under way at once in one rack (power, cooling, the rack's switch); 0 = no limit.")
    images_quota_bytes: int = Field(default=1 << 40, gt=0, description="The image store may hold so many bytes.")
    image_formats: str = Field(
        default="qcow2 raw", description="What may be imported, separated by blanks: qcow2, raw, vmdk (monolithicSparse, streamOptimized), vhd, vhdx."
    )
    import_dir: Path | None = Field(default=None, description="Images may be imported from files below this folder of the service's machine; empty = none.")
    import_keyring: Path | None = Field(
        default=None, description="OpenPGP keys (gpg --export) that may sign images fetched from a URL; empty = a URL needs a SHA-256."
    )
    import_local_addresses: bool = Field(default=False, description="A URL to import from may lead to this machine or to link-local addresses.")
    console_files: str = Field(
        default="", pattern=r"^$|^/.*\{server\}",
        description="Files that servers' serial consoles are appended to (conman, conserver), /PATH/{server}.log; kept with each run. Empty = none.",
    )  # fmt: skip
    webhook_local_addresses: bool = Field(default=False, description="A webhook's URL may lead to this machine or to link-local addresses.")
    rate_per_s: float = Field(default=50, gt=0, description="Requests a second and credential; above it 429. Lists: a fifth of it.")
    rate_burst: int = Field(default=200, gt=0, description="Requests a credential may send at once. Lists: half of it.")

    @field_validator("media_url")
    @classmethod
    def _media_urls(cls, value: str) -> str:
        for url in value.split() or [""]:
            if fault := find_url_fault(url):
                raise ValueError(f"each {fault}")
        return value

    @field_validator("chunks_url")
    @classmethod
    def _chunks_url(cls, value: str) -> str:
        if value and (fault := find_url_fault(value, schemes=("https",))):
            raise ValueError(fault)
        return value

    @field_validator("chunk_caches")
    @classmethod
    def _chunk_caches(cls, value: str) -> str:
        for _, url in split_caches(value):
            if fault := find_url_fault(url):
                raise ValueError(f"each {fault}")
        return value

    @field_validator("import_dir", "import_keyring", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        return value or None  # an empty path would be the site's own folder

    @field_validator("image_formats")
    @classmethod
    def _formats(cls, value: str) -> str:
        if not value.split() or set(value.split()) - {"qcow2", "raw", "vmdk", "vhd", "vhdx"}:
            raise ValueError("must name some of: qcow2 raw vmdk vhd vhdx")
        return value

    @field_validator("agent_url")
    @classmethod
    def _agent_url(cls, value: str) -> str:
        if fault := find_url_fault(value, schemes=("https",), with_path=False):
            raise ValueError(fault)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Given in code, then environment, then file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, settings_cls.model_config.get("toml_file"))


def load_settings(folder: Path, file: Path | None = None) -> Settings:
    """The settings of the site in `folder`, from its settings file or from `file`. Relative paths become absolute, from that folder."""

    class SiteSettings(Settings):
        model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", toml_file=file or folder / SETTINGS_FILE)

    refuse_unknown_variables(os.environ)
    try:
        settings = SiteSettings()
    except ValidationError as error:  # no input in the text: a URL may hold a password
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors(include_input=False, include_url=False)
        )
        raise RepaveError("bad-request", f"Settings: {faults}.", field=str(error.errors()[0]["loc"][0])) from None
    except tomllib.TOMLDecodeError as error:
        raise RepaveError("bad-request", f"{file or folder / SETTINGS_FILE} is not TOML: {error}.") from None
    settings.data_dir = (folder / settings.data_dir).resolve()
    settings.key_file = (folder / settings.key_file).resolve()
    settings.images_dir = (folder / (settings.images_dir or settings.data_dir / "images")).resolve()
    settings.cache_dir = (folder / (settings.cache_dir or settings.data_dir / "cache")).resolve()
    settings.boot_iso = (folder / (settings.boot_iso or settings.data_dir / "boot.iso")).resolve()
    if not settings.database_url:
        settings.database_url = f"sqlite:///{settings.data_dir / 'repave.db'}"
    if not settings.chunks_url:
        if not settings.chunks_listen:
            raise RepaveError("bad-request", "chunks_listen is empty: chunks_url is needed.", field="chunks_url")
        host = urlsplit(settings.agent_url).hostname or ""
        if _is_here_alone(settings.chunks_listen) and not _is_here_alone(settings.provisioning_listen):
            said = f"chunks_listen {settings.chunks_listen} is this machine alone, and servers ask elsewhere for all else: give it provisioning_listen's host."
            raise RepaveError("bad-request", said, field="chunks_listen")
        settings.chunks_url = f"https://{f'[{host}]' if ':' in host else host}:{split_listen(settings.chunks_listen)[1]}/chunks"
    if not 2 * settings.worker_beat_s <= settings.worker_fence_s < settings.worker_lease_s:
        raise RepaveError("bad-request", "worker_beat_s, worker_fence_s, worker_lease_s: twice the first at most the second, that less than the third.")
    for name in ("api_certificate", "media_certificate", "import_dir", "import_keyring"):
        if (path := getattr(settings, name)) is not None:
            setattr(settings, name, (folder / path).resolve())
    return settings


def _is_here_alone(listen: str) -> bool:
    host, _ = split_listen(listen)
    return host in ("localhost", "::1") or host.startswith("127.")


def refuse_unknown_variables(environment: Iterable[str]) -> None:
    """Raises bad-request for a REPAVE_ name that nothing of ours reads: it was meant for something, and is not in force."""
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    for name in sorted(n for n in environment if n.upper().startswith(ENV_PREFIX) and n.upper() not in known):
        meant = get_close_matches(name.upper(), sorted(known), 1)
        hint = f" Did you mean {meant[0]}?" if meant else ""
        raise RepaveError("bad-request", f"{name} in the environment is no setting of ours.{hint}", field=name)


def split_caches(value: str) -> list[tuple[str, str]]:
    """Rack ("" = all) and URL of each cache."""
    found = []
    for word in value.split():
        rack, is_one, url = word.partition("=")
        here = is_one and "/" not in rack  # a URL may hold a "=" too
        found.append((unquote(rack), url) if here else ("", word))
    return found


def split_listen(value: str) -> tuple[str, int]:
    """ "HOST:PORT" in two."""
    host, _, port = value.rpartition(":")
    return host.strip("[]"), int(port)
