"""Prefect flows. Prefect's own server on this machine is asked without a proxy between."""

import os

_HERE = "127.0.0.1,localhost,::1"

for _name in ("NO_PROXY", "no_proxy"):  # Prefect's client reads them when it is made
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), _HERE)))
