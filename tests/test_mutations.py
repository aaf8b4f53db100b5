"""The table of mutations fits the code that it breaks."""

import mutate
import pytest


def test_every_text_stands_once_in_its_file():
    try:
        suites, mutations = mutate.read()
    except SystemExit as outdated:
        pytest.fail(str(outdated))
    assert {mutation.suite for mutation in mutations} == set(suites)
