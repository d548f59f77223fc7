"""A server's power by an operator's order, outside any run.

A live run owns its server's power, so it is looked for with the order, again right before anything is sent that changes the server, and all the while
the OS shuts down: a run that is admitted meanwhile wins, and finds the BMC free. The order is in the audit before it is carried out; the power that was
read back after it is kept with its time.
"""

from __future__ import annotations

from typing import Literal

from repave.bmc import Power
from repave.domain.model import Server
from repave.errors import RepaveError
from repave.store import Store
from repave.workflow.effects import OpenBmc
from repave.workflow.fleet import Fleet
from repave.workflow.lease import LeaseGiven, LeaseLapsed

Order = Literal["on", "off", "restart"]


class PowerSwitch:
    """Carries orders out. The OS has `graceful_s` to shut down before its power is cut."""

    def __init__(self, store: Store, fleet: Fleet, open_bmc: OpenBmc, *, graceful_s: float) -> None:
        self._store, self._fleet, self._open_bmc, self._graceful_s = store, fleet, open_bmc, graceful_s

    def carry_out(self, server: Server, order: Order, *, force: bool, actor: str) -> Power:
        """The power as read back. Blocks. A restart that fails half way leaves it off.

        Raises: in-progress, wrong-server, order-cut-short, BmcError; where the order takes power away, also locked and own-host.
        """

        def may_switch() -> None:
            self._store.servers.refuse_live(server.id)
            if order != "on":
                self._fleet.refuse_protected([self._store.servers.get_server(server.id)])

        may_switch()
        self._store.servers.record_power_order(server.id, order, force=force, actor=actor)
        try:
            with self._open_bmc(server, may_switch) as bmc:
                if order != "on":
                    bmc.power_off(graceful_s=0 if force else self._graceful_s, while_waiting=may_switch)
                    self._store.servers.record_power(server.id, Power.OFF.value)
                if order != "off":
                    bmc.power_on()
                    self._store.servers.record_power(server.id, Power.ON.value)
        except (LeaseLapsed, LeaseGiven):
            raise RepaveError("order-cut-short") from None
        return Power.OFF if order == "off" else Power.ON
