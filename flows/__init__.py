"""Prefect flows, which reach a Prefect server on this machine without a proxy."""

import os

_LOOPBACK = "127.0.0.1,localhost,::1"

for _name in ("NO_PROXY", "no_proxy"):  # Prefect's client reads them at its creation
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), _LOOPBACK)))
