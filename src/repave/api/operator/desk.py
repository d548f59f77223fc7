"""What the routes work with, and what they ask of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from repave.api.operator.answers import Json
from repave.auth import Caller
from repave.auth.aksk import Presented
from repave.bmc import BmcAddress, BmcFacts
from repave.domain.model import Credential, Image, Server, Step, Webhook
from repave.domain.waves import Waves
from repave.images.fetch import ImageSources
from repave.images.headers import FileState
from repave.store import Store
from repave.workflow.fleet import Override
from repave.workflow.power import PowerSwitch


class Admits(Protocol):
    """What these routes ask of workflow.fleet."""

    def admit(
        self, *, credential: Credential, instance_ids: list[str], image_id: str | None, password: str,
        ssh_keys: tuple[str, ...] = (), user_data: str = "", answer_keys: Mapping[str, str] = ..., rehearse: bool = False,
        waves: Waves = ..., overrides: Mapping[str, Override] = ...,
    ) -> Any: ...  # fmt: skip

    def refuse_protected(self, servers: Sequence[Server]) -> None:
        """Raises RequestError locked or own-host."""


class Images(Protocol):
    """What these routes ask of the image store: room for a file, that file made into an image, and its chunks gone."""

    folder: Path
    sources: ImageSources

    def room_bytes(self) -> int:
        """Bytes that may still be stored."""

    def add(
        self, file: Path | int, *, name: str, os_type: str, arch: str, project_id: str, image_id: str, created_at: datetime,
        progress: Callable[[int, int], None], since: FileState | None = None,
    ) -> Image:  # fmt: skip
        """The image of this file, its chunks stored; `since` as in `import_image`. Blocks for minutes. Raises ImageError."""

    def alone(self) -> AbstractContextManager[None]:
        """Nobody else imports or removes, on any worker: an image whose row is not there yet must not be swept.

        Blocks while an import runs; raises meanwhile as `refuse_over` does.
        """

    def refuse_over(self) -> None:
        """Raises ImageError service-ending where the service ends: no import goes on, and nobody waits for one."""

    def verify(self, manifest_sha256: str) -> None:
        """Every chunk has its digest. Blocks 0.8 s per GB. Raises ImageError."""

    def sweep(self, manifests_in_use: list[str]) -> int:
        """Manifests not in use are gone, and the chunks that no other needs. How many."""


@dataclass
class ImportProgress:
    """One import under way, as GET /imports shows it. `total_bytes` 0: not known."""

    project_id: str
    name: str
    begun_at: datetime
    stage: Literal["receive", "fetch", "check", "wait", "store"] = "receive"  # wait: for another import
    done_bytes: int = 0
    total_bytes: int = 0

    def begin(self, stage: Literal["fetch", "check", "wait", "store"]) -> None:
        self.stage, self.done_bytes, self.total_bytes = stage, 0, 0

    def tell(self, done: int, total: int) -> None:
        self.done_bytes, self.total_bytes = done, total


@dataclass(frozen=True)
class Desk:
    """What the routes work with."""

    store: Store
    fleet: Admits
    images: Images
    identify: Callable[[Presented], Caller]
    probe: Callable[[BmcAddress], BmcFacts]  # asks a BMC what it is and touches nothing; raises BmcError
    find_unreachable: Callable[[str], str | None]  # by a BMC's URL: the setting whose address can not be reached from there
    set_bmc_password: Callable[[BmcAddress, str], None]
    power: PowerSwitch
    send_test: Callable[[Webhook], None]
    imports: list[ImportProgress]  # under way in this process
    waits_s: Mapping[Step, float] = field(default_factory=dict)  # how long a step may wait for the outside, by the site's settings
    describe_site: Callable[[], Json] = dict  # versions, and settings without secrets
