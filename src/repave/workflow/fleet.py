"""Admission: one request for many becomes a batch, its runs and their queued workflows, in one transaction or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

from repave.domain.model import Batch, Credential, Image, Instance, Server
from repave.domain.own_host import find_own_host
from repave.domain.password import find_password_fault, user_for
from repave.domain.states import may_reinstall
from repave.domain.waves import Limits, Waves
from repave.errors import RequestError
from repave.password_hash import hash_password
from repave.secrets import fingerprint
from repave.store import Enqueue, NewRun, Store, new_id

MAX_BATCH = 50  # ReinstallOS, 2025-07-25
WAITING_TIMEOUT_S = 24 * 3600.0
ALL_AT_ONCE = Waves()
NO_LIMITS = Limits()


@dataclass(frozen=True)
class Override:
    """What is asked for one instance otherwise than for its batch; None = as the batch."""

    image_id: str | None = None
    password: str | None = field(default=None, repr=False)
    ssh_keys: tuple[str, ...] | None = None
    user_data: str | None = field(default=None, repr=False)
    hostname: str | None = None  # of the new OS; None = the instance's name


AS_THE_BATCH = Override()
NO_OVERRIDES: Mapping[str, Override] = {}
NO_ANSWERS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Admitted:
    batch_id: str
    instance_ids: tuple[str, ...]  # in the order of the request


class Fleet:
    """Who may be reinstalled now, and how it is begun."""

    def __init__(
        self, store: Store, enqueue: Enqueue, *, run_timeout_s: float, waiting_timeout_s: float = WAITING_TIMEOUT_S, limits: Limits = NO_LIMITS,
        max_batch: int = MAX_BATCH,
    ) -> None:  # fmt: skip
        self.store, self.run_timeout_s, self.waiting_timeout_s, self.max_batch = store, run_timeout_s, waiting_timeout_s, max_batch
        store.enqueue, store.limits = enqueue, limits  # a run that ends lets others begin, in its own transaction

    def admit(
        self,
        *,
        credential: Credential,
        instance_ids: Sequence[str],
        image_id: str | None,
        password: str,
        ssh_keys: Sequence[str] = (),
        user_data: str = "",
        answer_keys: Mapping[str, str] = NO_ANSWERS,
        rehearse: bool = False,
        waves: Waves = ALL_AT_ONCE,
        overrides: Mapping[str, Override] = NO_OVERRIDES,
    ) -> Admitted:
        """Every id has exactly one run, or nothing happened.

        Args: rehearse: nothing will be written, so no password is needed. overrides: by instance. answer_keys: under which the answer is kept for a day,
        each with what the request is known by (`Access.find_answer`).
        Raises RequestError: bad-request (context field), not-found (kind instance or image, ids), in-progress (kind state, ids), locked and
        own-host (kind server, ids).
        """
        if not 1 <= len(instance_ids) <= self.max_batch or len(set(instance_ids)) != len(instance_ids):
            raise RequestError("bad-request", f"instance_id_set wants 1 to {self.max_batch} distinct ids.", field="instance_id_set")
        project_id = credential.project_id
        instances = self._find_instances(project_id, instance_ids)
        images = self._find_images(project_id, instances, image_id, overrides)
        for_all = Override(password=password, ssh_keys=tuple(ssh_keys), user_data=user_data)
        asked = {i.id: _fill(overrides.get(i.id, AS_THE_BATCH), for_all) for i in instances}
        passwords = {i.id: (images[i.id].os_type, asked[i.id].password or "") for i in instances}
        if not rehearse:
            check_passwords(passwords)
        busy = [i.id for i in instances if not may_reinstall(i.state)]
        if busy:
            raise RequestError("in-progress", "", kind="state", ids=busy)
        servers = self.store.servers.get_servers([i.server_id for i in instances])
        self.refuse_protected([servers[i.server_id] for i in instances])
        secrets = {each: "" if rehearse else self._secret(*each) for each in {*passwords.values()}}

        now = self.store.now()
        batch = Batch(
            new_id(), project_id, image_id, now, credential.name, None, rehearse=rehearse,
            canary=waves.canary, at_once=waves.at_once, max_failed=waves.max_failed,
        )  # fmt: skip
        run_ids = [new_id() for _ in instances]
        answer = {"status": 202, "body": {"instances": [{"id": i} for i in instance_ids]}, "batch_id": batch.id}
        try:
            self.store.sealer.make_run_keys(run_ids)
            runs = [
                self._new_run(run_id, i, servers[i.server_id], images[i.id], secrets[passwords[i.id]], asked[i.id])
                for run_id, i in zip(run_ids, instances, strict=True)
            ]
            self.store.runs.accept_batch(batch, runs, answer_keys=answer_keys, answer=answer)
        except BaseException:
            for run_id in run_ids:
                self.store.sealer.destroy_run(run_id)
            raise
        return Admitted(batch.id, tuple(instance_ids))

    def refuse_protected(self, servers: Sequence[Server]) -> None:
        """Raises RequestError locked or own-host, naming the first server and its reason, with the ids of all."""
        if locked := [s for s in servers if s.locked_at is not None]:
            said = f"{locked[0].name}, by {locked[0].locked_by} on {locked[0].locked_at:%Y-%m-%d}: {locked[0].lock_reason}"
            raise RequestError("locked", said, kind="server", ids=[s.id for s in locked])
        hosts = self.store.servers.list_hosts()
        own = [(s, why) for s in servers if (why := find_own_host(s, hosts))]
        if own:
            raise RequestError("own-host", f"{own[0][0].name} has {own[0][1]}.", kind="server", ids=[s.id for s, _ in own])

    def _find_instances(self, project_id: str, ids: Sequence[str]) -> list[Instance]:
        found, _ = self.store.servers.list_instances(project_id, ids=ids)
        by_id = {i.id: i for i in found}
        missing = [i for i in ids if i not in by_id]
        if missing:
            raise RequestError("not-found", "", kind="instance", ids=missing)
        return [by_id[i] for i in ids]

    def _find_images(self, project_id: str, instances: Sequence[Instance], image_id: str | None, overrides: Mapping[str, Override]) -> dict[str, Image]:
        """The image of each instance: the one asked for, or its current one, refused where that is unknown."""
        wanted = {i.id: overrides.get(i.id, AS_THE_BATCH).image_id or image_id or i.image_id for i in instances}
        unknown = [i for i, image in wanted.items() if image is None]
        if unknown:
            raise RequestError("bad-request", "image_id is needed: the current image is not known.", field="image_id", ids=unknown)
        images: dict[str, Image] = {}
        for wanted_id in {i for i in wanted.values() if i is not None}:
            image = self.store.images.find_image(project_id, wanted_id)
            if image is None:
                raise RequestError("not-found", "", kind="image", ids=[wanted_id])
            images[wanted_id] = image
        return {instance_id: images[str(wanted_id)] for instance_id, wanted_id in wanted.items()}

    def _secret(self, os_type: str, password: str) -> str:
        """Linux: the sha512-crypt hash, once a batch and password; Windows: the password (cloudbase-init wants it)."""
        return password if os_type == "Windows" else hash_password(password)

    def _new_run(self, run_id: str, instance: Instance, server: Server, image: Image, secret: str, asked: Override) -> NewRun:
        sealer = self.store.sealer
        sealed = sealer.seal_for_run(run_id, json.dumps({"password": secret, "user_data": asked.user_data}))
        token, session, nonce = (fingerprint(sealer.derive_for_run(run_id, what)) for what in ("agent", "session", "nonce"))
        begin_by = self.store.now() + timedelta(seconds=self.waiting_timeout_s)
        return NewRun(
            run_id, instance, server, image.id, begin_by, self.run_timeout_s, sealed, token, session, nonce, asked.ssh_keys or (), asked.hostname
        )  # fmt: skip


def check_passwords(wanted: Mapping[str, tuple[str, str]]) -> None:
    """By instance: each password is good for the user that an OS of this type has. Raises RequestError bad-request, which never repeats it."""
    for os_type, password in sorted({*wanted.values()}):
        if fault := find_password_fault(password, user=user_for(os_type)):
            whose = [i for i, each in wanted.items() if each == (os_type, password)]
            raise RequestError("bad-request", f"password {fault}.", field="password", ids=whose)


def _fill(override: Override, for_all: Override) -> Override:
    """What the override says nothing of is as for all."""
    return replace(for_all, **{name: value for name, value in vars(override).items() if value is not None})
