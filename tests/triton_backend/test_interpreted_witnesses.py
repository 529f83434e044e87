"""The tests that tests/README.md names beside the mistakes planted in the Triton kernels are still run."""

import types

import witnesses
from mutations import ROOT, TRITON


def test_what_noticed_is_still_run(request):
    witnesses.check(TRITON, request.session)


def test_a_lost_one_is_noticed():
    found = witnesses.witnesses(TRITON)
    items = [types.SimpleNamespace(path=ROOT / file, name=name) for file, name in found.values()]
    assert witnesses.lost(TRITON, items) == []
    gone = found["one-round"]
    assert witnesses.lost(TRITON, [i for i in items if i.name != gone[1]]) == ["one-round"]
    assert len(witnesses.lost(TRITON, [])) == len(found)
