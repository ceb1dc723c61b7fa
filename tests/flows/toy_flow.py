"""``run-stage`` over the toy plan, for workers: they are processes of their own."""

from flows import run_stage as flow
from tests.flows.toy_stages import use_slow_plan

use_slow_plan()
run_stage = flow.run_stage
