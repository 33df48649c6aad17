"""What every test starts with: one thread, no display, no network, a cache of its own and an empty working folder."""
import os, tempfile
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
if 'GAMENGEN_HOME' not in os.environ: # kept until the process ends, removed with it
    _home = tempfile.TemporaryDirectory(prefix='gamengen-home-'); os.environ['GAMENGEN_HOME'] = _home.name

import pytest

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Tests work in a folder of their own, so that none depends on the checkout's or writes into it."
    monkeypatch.chdir(tmp_path)

@pytest.fixture(scope='session')
def root(): "The checkout."; return ROOT
