"""``run-stage`` over the toy plan, for workers: they are processes of their own."""

from flows.run_stage import run_stage as run_stage
from tests.flows.toy_stages import use_slow_plan

use_slow_plan()
