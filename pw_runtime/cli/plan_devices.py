# SPDX-License-Identifier: Apache-2.0
"""--devices, --gpu and --link of `pw plan`: the devices that a plan is for, here or elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from pw_runtime.cli.options import Bytes
from pw_runtime.errors import BadRequest

if TYPE_CHECKING:
    from pw_runtime.planning.time_estimate import Rates

MOST_DIGITS = 5  # of a number of devices


class Devices(click.ParamType):  # type: ignore[type-arg]
    """A number of devices, and the memory of each: 8, 8x24GiB."""

    name = "devices"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:
        """Turn the text of an option into a number of devices and bytes."""
        if isinstance(value, tuple):
            return value
        number, times, size = str(value).strip().lower().partition("x")
        count = int(number) if number.isdecimal() and len(number) <= MOST_DIGITS else 0
        if count < 1:
            self.fail(f"invalid devices {value!r}: expected e.g. 8 or 8x24GiB", param, ctx)
        return count, Bytes().convert(size, param, ctx) if times else None


def ranks_and_memory(options: dict[str, Any]) -> tuple[int, int | None]:
    """Return the number of ranks and the memory of each GPU, where it is named.

    Raises BadRequest where it is named twice, where this machine has fewer GPUs, and for a link
    between devices that are not there or have no times.
    """
    import torch

    ranks, memory = options["devices"] or (1, None)
    if options["link"] is not None and (ranks == 1 or options["gpu"] is None):
        raise BadRequest(
            "--link is the speed between several GPUs whose times are known",
            got="one device" if ranks == 1 else "no --gpu",
            do="add --devices and --gpu, 8x141GiB and H200 for instance, or leave --link out",
        )
    if memory is not None and options["gpu_memory"] is not None:
        raise BadRequest(
            "the memory of the GPUs is named twice: by --devices and by --gpu-memory",
            do="leave one of them out",
        )
    memory = memory or options["gpu_memory"]
    here = torch.cuda.device_count()
    if memory is None and torch.cuda.is_available() and here < ranks:
        raise BadRequest(
            "this machine has fewer GPUs than --devices",
            got=f"{here}",
            wanted=f"{ranks}",
            do=f"name the memory of each to plan for another machine, --devices {ranks}x24GiB "
            "for instance",
        )
    return ranks, memory


def rates_of(options: dict[str, Any]) -> Rates:
    """Return the rates of the named GPU, with the named link."""
    from pw_runtime.planning.time_estimate import KNOWN

    rates = KNOWN[options["gpu"]]
    return rates if options["link"] is None else replace(rates, link=float(options["link"]))
