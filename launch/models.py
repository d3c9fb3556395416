"""Models by id: looked up once on a node, whoever started the ranks, so that all of them read the same."""

import json
import os
import socket
from collections.abc import Mapping
from datetime import timedelta

from engine.data.hub import find_model, may_be_id
from engine.errors import ConfigError
from launch.processes import MODELS, World, meeting_place

_DOWNLOAD = timedelta(hours=24)
"""Longest wait for another rank's download."""


def locate(name: str, *, use_hf: bool | None, world: World | None = None) -> str:
    """The directory of a model that is named by its path or by an id. Raises ConfigError.

    Our own launcher has told its ranks. Of the ranks of a `world` that somebody else started, one on each
    node looks it up and tells the others.
    """
    found: Mapping[str, str] = json.loads(os.environ.get(MODELS, "{}"))
    if name in found:
        return found[name]
    if world is None or not world.started or world.local_size == 1 or not may_be_id(name):
        return find_model(name, use_hf=use_hf)
    store, key = meeting_place(world), f"model {name} on {socket.gethostname()}"
    if world.local_rank != 0:
        store.wait([key], _DOWNLOAD)
        told = json.loads(store.get(key))
        if told["error"] is not None:
            raise ConfigError(told["error"])
        return str(told["directory"])
    try:
        directory = find_model(name, use_hf=use_hf)
    except ConfigError as error:
        store.set(key, json.dumps({"directory": None, "error": str(error)}))
        raise
    store.set(key, json.dumps({"directory": directory, "error": None}))
    return directory
