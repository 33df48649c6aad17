"""Training goes on where it was: kill -9, Ctrl-C, a full disk and a damaged checkpoint change nothing in the result, not one bit."""
import math, os, signal, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gamengen_nb.core import CheckpointError, ConfigError, DataError, preset, rng
from gamengen_nb.training import HoldInterrupt, fit, lr_at, read_metrics

torch.set_num_threads(1)
STEPS = 24

def batch(step, samples): x = torch.tensor(np.stack([rng('x', i).standard_normal(3) for i in samples]), dtype=torch.float32); return dict(x=x, y=x.sum(1, keepdim=True))
def loss(m, x, y): l = (m(x)-y).pow(2).mean(); return l, dict(rmse=l.detach().sqrt())
def net(seed=0): torch.manual_seed(seed); return nn.Sequential(nn.Linear(3, 8), nn.Dropout(.2), nn.ReLU(), nn.Linear(8, 1))
def train(folder, seed=0, batch_fn=batch, steps=STEPS, **kw):
    m = net(seed); return m, fit(m, batch_fn, loss, folder, **(dict(steps=steps, batch=4, lr=.02, warmup=4, precision='no', log_every=4, progress=False)|kw))
def at_step(n, do): # `do` is called before update n
    def f(step, samples):
        if step==n: do()
        return batch(step, samples)
    return f
def final(folder, step=STEPS): return {f.name:f.read_bytes() for f in sorted((Path(folder)/f'step-{step:08d}').iterdir()) if f.name not in ('info.json', 'sha256.json')}
def checkpoints(folder): return sorted(p.name for p in Path(folder).glob('step-*'))
def curve(folder): m = read_metrics(folder); return {k:m[k] for k in ('step', 'loss', 'lr', 'grad_norm', 'rmse')}

@pytest.fixture(autouse=True)
def keyboard(): # a test run in the background of a script may have Ctrl-C ignored
    old = signal.signal(signal.SIGINT, signal.default_int_handler); yield; signal.signal(signal.SIGINT, old)

class PowerCut(Exception): pass
def cut(): raise PowerCut

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole'); m,stat = train(folder)
    assert stat['step']==STEPS and not m.training and list(final(folder))==['ema.safetensors', 'model.safetensors', 'optimizer.pt']
    return folder

# ---- numbers and names
def test_unknown_presets_and_fields():
    with pytest.raises(ConfigError, match="no preset 'huge'; choose one of tiny, laptop, gpu, paper"): preset('huge')
    with pytest.raises(ConfigError, match='no field batchsize; it has name, scenario'): preset('tiny', batchsize=2)
    assert preset('tiny', batch=2).batch==2 and set(asdict(preset('paper')))==set(asdict(preset('tiny')))

def test_the_trapezoid():
    assert [lr_at(0, s, warmup=4) for s in range(6)]==[.25, .5, .75, 1, 1, 1]
    assert np.allclose([lr_at(p, 99, warmup=4) for p in (0, .8, .9, .95, 1)], [1, 1, .5, .25, 0]) and lr_at(1, 99, warmup=4, decay=0)==1

@pytest.mark.parametrize('budget', [dict(steps=0), dict(steps=5, minutes=1)])
def test_a_budget_is_steps_or_minutes(tmp_path, budget):
    with pytest.raises(ConfigError, match='either steps or minutes'): train(tmp_path, **budget)

def test_minutes_count_over_all_sessions(tmp_path):
    _,a = train(tmp_path, steps=0, minutes=.004); assert a['step']>0 and a['seconds']>=.24
    assert train(tmp_path, steps=0, minutes=.004)[1]['step']==a['step']

def test_a_loss_that_becomes_nan_is_said(tmp_path):
    with pytest.raises(ConfigError, match='NaN at step 4; lower the learning rate'): fit(net(), batch, lambda m,x,y: m(x).sum()*math.nan, tmp_path, steps=9, log_every=4, batch=4, progress=False, precision='no')
    assert not checkpoints(tmp_path)

def test_torch_generator_is_left_alone(tmp_path):
    torch.manual_seed(1); want = torch.rand(3); torch.manual_seed(1); m = nn.Linear(3, 1); torch.manual_seed(1)
    fit(m, batch, loss, tmp_path, steps=2, batch=4, progress=False, precision='no'); assert torch.equal(torch.rand(3), want)

# ---- exact resume
@pytest.mark.parametrize('n', [1, 11, STEPS-1])
def test_n_kill_n_equals_2n(whole, tmp_path, n):
    with pytest.raises(PowerCut): train(tmp_path, batch_fn=at_step(n, cut), save_minutes=0)
    assert checkpoints(tmp_path)[-1]==f'step-{n:08d}' and len(checkpoints(tmp_path))<=2
    train(tmp_path, seed=9)                                                             # other initial weights: the checkpoint's count
    assert final(tmp_path)==final(whole) and curve(tmp_path)==curve(whole)

def test_the_result_is_the_average_and_a_finished_run_trains_no_more(whole):
    before = {f:f.read_bytes() for f in whole.rglob('*') if f.is_file()}; m,_ = train(whole, seed=5)
    from safetensors.torch import load_file
    ema,last = load_file(whole/f'step-{STEPS:08d}'/'ema.safetensors'),load_file(whole/f'step-{STEPS:08d}'/'model.safetensors')
    assert all(torch.equal(p, ema[k]) for k,p in m.named_parameters()) and not torch.equal(ema['0.weight'], last['0.weight'])
    assert {f:f.read_bytes() for f in whole.rglob('*') if f.is_file()}==before

def test_ctrl_c_finishes_the_step_saves_and_resumes(whole, tmp_path):
    old = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): train(tmp_path, batch_fn=at_step(9, lambda: signal.raise_signal(signal.SIGINT)))
    assert checkpoints(tmp_path)==['step-00000010'] and signal.getsignal(signal.SIGINT)==old
    train(tmp_path, seed=9); assert final(tmp_path)==final(whole) and curve(tmp_path)==curve(whole)

def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(): signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): train(tmp_path, batch_fn=at_step(9, twice))
    assert not checkpoints(tmp_path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with HoldInterrupt() as h: signal.raise_signal(signal.SIGINT)
    assert not h.asked and signal.getsignal(signal.SIGINT)==signal.SIG_IGN              # ignored stays ignored

# ---- damage
@pytest.mark.parametrize('name', ['model.safetensors', 'ema.safetensors', 'optimizer.pt', 'info.json', 'sha256.json'])
def test_a_damaged_newest_checkpoint_falls_back(whole, tmp_path, capsys, name):
    with pytest.raises(PowerCut): train(tmp_path, batch_fn=at_step(10, cut), save_minutes=0)
    f = tmp_path/'step-00000010'/name; b = f.read_bytes(); k = int(rng('flip', name).integers(len(b))); f.write_bytes(b[:k]+bytes([b[k]^4])+b[k+1:])
    train(tmp_path, seed=9); said = capsys.readouterr().out
    assert 'Going back to the checkpoint before it' in said and 'step-00000010' in said
    assert final(tmp_path)==final(whole) and curve(tmp_path)==curve(whole)

def test_missing_or_truncated_everywhere_is_said(tmp_path, capsys):
    with pytest.raises(PowerCut): train(tmp_path, batch_fn=at_step(3, cut), save_minutes=0)
    a,b = (tmp_path/c for c in checkpoints(tmp_path)); (a/'optimizer.pt').unlink(); w = b/'model.safetensors'; w.write_bytes(w.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match='No whole checkpoint is left') as e: train(tmp_path)
    assert 'optimizer.pt is missing' in str(e.value) and 'is damaged' in capsys.readouterr().out

def test_another_models_checkpoint_is_refused_not_skipped(whole):
    with pytest.raises(CheckpointError, match='belongs to another model'): fit(nn.Linear(3, 2), batch, loss, whole, steps=STEPS, batch=4, progress=False, precision='no')

def test_a_torn_log_is_read_and_mended(whole, tmp_path):
    with pytest.raises(PowerCut): train(tmp_path, batch_fn=at_step(9, cut), save_minutes=0)
    with open(tmp_path/'metrics.jsonl', 'a') as f: f.write('{"step": 12, "loss": 9}\n{"step": 16, "lo')   # beyond the checkpoint, and half a line
    assert read_metrics(tmp_path)['step']==[4, 8, 12]
    train(tmp_path); assert curve(tmp_path)==curve(whole)
    with pytest.raises(DataError, match='train first'): read_metrics(tmp_path/'none')

# ---- a process of its own: a full disk, then kill -9
CHILD = f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import resource, signal, time
from test_training import at_step, batch, train
from gamengen_nb.core import GamegenError
full,killed = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
def limit(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
for n,step in ((1500, 7), (400, 9)): # first the optimiser's file does not fit, then not even the weights
    try: train(full, batch_fn=at_step(step, lambda: limit(n)), save_minutes=0)
    except GamegenError as e: print(type(e).__name__, e, flush=True)
    limit(hard)
def slow(step, samples): time.sleep(.03 if step<20 else 600); return batch(step, samples)
train(killed, batch_fn=slow, save_minutes=0)
'''

def test_full_disk_and_kill_9_while_training(whole, tmp_path):
    full,killed = tmp_path/'full',tmp_path/'killed'
    p = subprocess.Popen([sys.executable, '-c', CHILD, str(full), str(killed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    end = time.monotonic()+300
    while not (killed/'step-00000006').exists() and time.monotonic()<end and p.poll() is None: time.sleep(.005)
    time.sleep(.02); p.kill(); out,err = p.communicate(timeout=60); said = out.splitlines()
    assert len(said)==2 and all(s.startswith('DataError Could not write the checkpoint') and 'Free some space' in s for s in said), out+err
    assert checkpoints(full)==['step-00000008', 'step-00000009'] and not (full/'.state.tmp').exists()
    train(full, seed=9); assert final(full)==final(whole) and curve(full)==curve(whole)      # nothing finished was lost, the next run goes on
    assert p.returncode==-signal.SIGKILL and 'step-00000006'<=checkpoints(killed)[-1]<'step-00000024'
    train(killed, seed=9); assert final(killed)==final(whole) and curve(killed)==curve(whole)   # killed in another process, finished in this one: the same bytes

def test_a_full_disk_while_logging_is_one_sentence(tmp_path):
    (tmp_path/'metrics.jsonl').symlink_to(tmp_path/'nowhere'/'x')
    with pytest.raises(DataError, match='Could not write .*Free some space'): train(tmp_path)
