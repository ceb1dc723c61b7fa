"""The authors' packages with current libraries, each case in an interpreter of its own."""

import subprocess
import sys

import pytest


def run(code: str) -> None:
    prelude = "import sys\nfrom diffagent.rewards.official import install\ninstall()\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_image_reward_imports_without_its_trainer_and_leaves_nothing_behind():
    run(
        "import warnings\n"
        "from transformers.utils import logging\n"
        "before = list(warnings.filters), logging.get_verbosity()\n"
        "import ImageReward\n"
        "assert before == (list(warnings.filters), logging.get_verbosity())\n"
        "from ImageReward.models.BLIP.med import BertModel\n"
        "from transformers import modeling_utils, PreTrainedModel\n"
        "assert callable(ImageReward.load)\n"
        "assert 'diffusers' not in sys.modules and 'datasets' not in sys.modules\n"
        "lent = {'clip', 'fairscale', 'ImageReward.ReFL'}\n"
        "assert not lent & set(sys.modules), lent & set(sys.modules)\n"
        "assert not hasattr(modeling_utils, 'find_pruneable_heads_and_indices')\n"
        "assert not hasattr(PreTrainedModel, 'get_head_mask')\n"
    )


def test_hpsv2_imports_and_tokenizes_like_open_clip():
    run(
        "import open_clip, hpsv2.img_score, hpsv2.src.open_clip as theirs\n"
        "assert 'turtle' not in sys.modules and 'clint' not in sys.modules\n"
        "assert theirs.tokenizer.__file__.endswith('hpsv2/src/open_clip/tokenizer.py')\n"
        "text = ['a red circle, 8-bit']\n"
        "assert (theirs.tokenize(text) == open_clip.tokenize(text)).all()\n"
    )


def test_a_lent_module_gives_the_previous_one_back():
    import json

    from diffagent.rewards.official import _lend_modules

    with pytest.raises(RuntimeError), _lend_modules({"json": {"mark": 1}, "no_such_module": {}}):
        assert sys.modules["json"].mark == 1
        raise RuntimeError
    assert sys.modules["json"] is json
    assert "no_such_module" not in sys.modules
