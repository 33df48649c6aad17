"""Training goes on where it was: kill -9, Ctrl-C, a full disk and a damaged checkpoint change nothing in the result, not one bit;
parts, threads and processes change at most its last bits."""
import json, math, os, signal, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gamengen_nb.core import CheckpointError, ConfigError, DataError, preset, rng
from gamengen_nb.training import Adafactor, HoldInterrupt, fit, fit_options, lr_at, make_optimizer, read_metrics

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

# ---- the paper's training, and what makes it fit
def test_the_papers_numbers():
    assert fit_options(preset('paper'))==dict(batch=128, lr=2e-5, warmup=0, decay=0., clip=1., weight_decay=0., optimizer='adafactor', accumulate=1, checkpointing=False)
    p = preset('paper'); assert (p.context, p.unet_steps, p.drop_p, p.noise_max, p.noise_buckets, p.noise_power, p.t_focus, p.unroll, p.sample_steps, p.guidance, p.frames, p.vae_batch, p.latent_hw, p.latent_channels)==\
        (64, 700_000, .1, .7, 10, 1., 0., 1, 4, 1.5, 70_000_000, 2048, (32, 40), 4)
    assert all(lr_at(s/700_000, s, p.warmup, p.decay)==1 for s in (0, 1, 350_000, 699_999)), 'a constant rate'
    for n in ('tiny', 'laptop', 'gpu'): o = fit_options(preset(n)); assert (o['optimizer'], o['warmup'], o['decay'], o['clip'], o['weight_decay'], o['accumulate'], o['checkpointing'])==('adamw', 100, .2, 1., 0., 1, False)

def test_adafactor_is_torchs_without_the_weights_in_the_rate():
    gen = torch.Generator().manual_seed(1); w = .02*torch.randn(8, 5, generator=gen); grads = [torch.randn(8, 5, generator=gen)*10**(k-2.) for k in range(6)]
    def walk(make, w=w, grads=grads):
        p = nn.Parameter(w.clone()); o = make([p])
        for g in grads: p.grad = g.clone(); o.step()
        return p.detach()
    ours = walk(lambda p: Adafactor(p, lr=3e-3)); assert torch.allclose(ours, walk(lambda p: torch.optim.Adafactor(p, lr=3e-3, eps=(1e-30, 1.), weight_decay=0.)), atol=1e-6)
    assert torch.allclose(walk(lambda p: Adafactor(p, lr=3e-3), 100*w)-100*w, ours-w, atol=2e-5), 'the size of the weights must not matter'
    assert .9*3e-3<(walk(lambda p: Adafactor(p, lr=3e-3), grads=grads[:1])-w).square().mean().sqrt()<1.001*3e-3

def test_adafactor_remembers_little_and_resumes(tmp_path):
    kw = dict(optimizer='adafactor', warmup=0, decay=0); train(tmp_path/'a', **kw)
    with pytest.raises(PowerCut): train(tmp_path/'b', batch_fn=at_step(10, cut), save_minutes=0, **kw)
    train(tmp_path/'b', seed=9, **kw); assert final(tmp_path/'a')==final(tmp_path/'b')
    assert json.loads((tmp_path/'a'/'step-00000024'/'info.json').read_text())['optimizer']=='Adafactor'
    with pytest.raises(CheckpointError, match='was trained with Adafactor, not AdamW'): train(tmp_path/'a')
    big = nn.Linear(320, 320, bias=False); big.weight.grad = torch.ones_like(big.weight); o = make_optimizer(big, 'adafactor'); o.step()
    assert sum(v.numel() for v in o.state[big.weight].values() if isinstance(v, torch.Tensor))==640

def test_a_checkpoint_of_the_first_release_is_read(whole, tmp_path): # its info.json names no optimizer and no processes
    with pytest.raises(PowerCut): train(tmp_path, batch_fn=at_step(9, cut), save_minutes=0)
    from gamengen_nb.core import seal
    for c in checkpoints(tmp_path):
        f = tmp_path/c/'info.json'; f.write_text(json.dumps({k:v for k,v in json.loads(f.read_text()).items() if k in ('step', 'seconds', 'loss')})); seal(tmp_path/c)
    train(tmp_path, seed=9); assert final(tmp_path)==final(whole)

def small(): torch.manual_seed(0); return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
def weights(folder, model=None, **kw):
    m = model or small(); fit(m, batch, loss, folder, **(dict(steps=STEPS, batch=4, lr=.02, warmup=4, precision='no', log_every=4, progress=False)|kw)); return torch.cat([p.detach().flatten() for p in m.parameters()])

def test_parts_and_a_thread_learn_the_same(tmp_path):
    one = weights(tmp_path/'one'); assert torch.equal(one, weights(tmp_path/'thread', prefetch=True))
    assert torch.allclose(one, weights(tmp_path/'parts', accumulate=4), atol=1e-6)
    assert np.allclose(read_metrics(tmp_path/'one')['rmse'][0], read_metrics(tmp_path/'parts')['rmse'][0], rtol=.5) and min(read_metrics(tmp_path/'one')['update_ratio'])>1e-4
    with pytest.raises(ConfigError, match='batch of 4 does not divide over 1 processes and 3 passes'): weights(tmp_path/'x', accumulate=3)
    with pytest.raises(PowerCut): fit(small(), at_step(5, cut), loss, tmp_path/'cut', steps=STEPS, batch=4, prefetch=True, progress=False, precision='no')

def test_checkpointing_computes_the_same(tmp_path):
    from diffusers import UNet2DModel
    def tiny(): torch.manual_seed(0); return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, down_block_types=('DownBlock2D',)*2, up_block_types=('UpBlock2D',)*2)
    def images(step, samples): return dict(x=torch.tensor(np.stack([rng('im', i).standard_normal((1, 8, 8), np.float32) for i in samples])))
    def kept(m, x):
        n = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: n.append(t.numel()) or t, lambda t: t): l = m(x, 3).sample.square().mean()
        seen.append(sum(n)); return l
    def run(name, **kw): m = tiny(); fit(m, images, kept, tmp_path/name, steps=3, batch=2, precision='no', progress=False, **kw); return torch.cat([p.detach().flatten() for p in m.parameters()])
    seen = []; a = run('a'); b = run('b', checkpointing=True); assert torch.equal(a, b) and seen[-1]<.6*seen[0]
    with pytest.raises(ConfigError, match='no gradient checkpointing'): weights(tmp_path/'x', checkpointing=True)

def test_trackers_are_optional(tmp_path):
    with pytest.raises(ConfigError, match='choose of tensorboard, wandb, trackio'): weights(tmp_path/'x', trackers='mlflow')
    from importlib.util import find_spec
    for t in ('tensorboard', 'wandb', 'trackio'):
        if not find_spec(t):
            with pytest.raises(ConfigError, match=f'{t} is not installed: pip install {t}'): weights(tmp_path/t, trackers=[t])
    if find_spec('tensorboard'):
        weights(tmp_path/'tb', trackers=['tensorboard'], desc='a run')
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        seen = EventAccumulator(str(next((tmp_path/'tb').glob('a-run/**/events*')).parent)); seen.Reload()
        assert np.allclose([e.value for e in seen.Scalars('loss')], read_metrics(tmp_path/'tb')['loss'])

# ---- several processes
CREW = f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os, signal, time
import torch, torch.distributed as dist
from pathlib import Path
from torch import nn
from gamengen_nb import training
from gamengen_nb.core import GamegenError
from test_training import batch, loss, small, weights
root,what = Path(sys.argv[1]),sys.argv[2]; rank = int(os.environ['RANK'])
kw = dict(steps=24, batch=4, lr=.02, warmup=4, precision='no', log_every=4, progress=False)
def die(at, how):
    def f(step, samples):
        seen.append(samples)
        if step==at: how()
        return batch(step, samples)
    return f
class Stop(Exception): pass
def stop(): raise Stop
def kill(): # the second process, in the middle of an update
    if rank==1: os.kill(os.getpid(), signal.SIGKILL)
seen = []
if what=='first':
    w = weights(root/'two'); assert dist.get_world_size()==2
    both = [torch.empty_like(w) for _ in range(2)]; dist.all_gather(both, w); assert torch.equal(*both)
    try: training.fit(small(), die(8, stop), loss, root/'swap', save_minutes=0, **kw) # all processes end at update 8: 2 of 2 -> 1 -> 2
    except Stop: pass
    (root/f'samples-{{rank}}.txt').write_text(repr(seen[3]))
    dist.barrier(); weights(root/'parts', accumulate=2)
    # minutes are the first process's: the second's clock runs a thousand times as fast
    if rank==1: real = time.monotonic; training.time = type('Clock', (), dict(monotonic=staticmethod(lambda: 1000*real())))
    t = time.perf_counter(); at = training.fit(small(), batch, loss, root/'minutes', **kw|dict(steps=0, minutes=.02)); training.time = time
    (root/f'minutes-{{rank}}.txt').write_text(repr((at['step'], time.perf_counter()-t)))
    # Ctrl-C heard by one of them: all finish the update, one saves, all stop
    try: training.fit(small(), die(9, lambda: rank==1 and signal.raise_signal(signal.SIGINT)), loss, root/'ctrl', **kw)
    except KeyboardInterrupt: (root/f'stopped-{{rank}}.txt').write_text('')
    # weights in pieces, as FSDP has them: a checkpoint holds them whole, and fills the pieces again
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    from diffusers.training_utils import EMAModel
    def trio(seed, cut=True):
        torch.manual_seed(seed); m = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
        if cut: fully_shard(m, mesh=init_device_mesh('cpu', (2,)))
        return m, EMAModel(m.parameters()), torch.optim.AdamW(m.parameters(), lr=.1)
    def go(m, avg, o): m(torch.ones(1, 6)).square().sum().backward(); o.step(); o.zero_grad(); avg.step(m.parameters())
    a = trio(0); go(*a); assert training.in_pieces(a[0]); training.save_state(root/'pieces', *a, dict(step=1), write=rank==0); dist.barrier()
    b,c = trio(1),trio(2, cut=False); training.load_state(root/'pieces', *b); training.load_state(root/'pieces', *c); go(*a); go(*b); go(*c)
    for p,q,r in zip(*(x[0].parameters() for x in (a, b, c))): assert torch.equal(p.full_tensor(), q.full_tensor()) and torch.allclose(p.full_tensor(), r, atol=1e-6)
    for p,q in zip(a[1].shadow_params, b[1].shadow_params): assert torch.equal(p.full_tensor(), q.full_tensor())
    (root/f'pieces-{{rank}}.txt').write_text('')
if what=='second':
    training.fit(small(), batch, loss, root/'swap', save_minutes=0, **kw)
    try: training.fit(small(), die(13, kill), loss, root/'lost', save_minutes=0, **kw)
    except GamegenError as e: (root/'said.txt').write_text(str(e)); print('gamengen:', e, file=sys.stderr, flush=True); sys.exit(2)
'''

def crew(root, what, n=2):
    (root/'crew.py').write_text(CREW); env = {k:v for k,v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}|dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), str(root/'crew.py'), str(root), what], env=env, capture_output=True, text=True, timeout=600)

def test_two_processes_and_the_death_of_one(tmp_path):
    r = crew(tmp_path, 'first'); assert r.returncode==0, r.stderr[-3000:]
    near = lambda a,b: torch.allclose(a, b, atol=1e-5, rtol=0)
    of = lambda run: weights(tmp_path/run)                                              # a finished run: loads, trains nothing
    processes = lambda run,step=STEPS: json.loads((tmp_path/run/f'step-{step:08d}'/'info.json').read_text())['processes']
    one = weights(tmp_path/'one'); assert processes('two')==2 and processes('one')==1, 'two processes really ran'
    assert near(one, of('two')) and near(one, of('parts')) and not near(one, torch.cat([p.flatten() for p in small().parameters()]))
    assert np.allclose(read_metrics(tmp_path/'one')['loss'][0], read_metrics(tmp_path/'two')['loss'][0], rtol=1e-5) and np.allclose(read_metrics(tmp_path/'one')['grad_norm'], read_metrics(tmp_path/'two')['grad_norm'], rtol=1e-3)
    assert [eval((tmp_path/f'samples-{k}.txt').read_text()) for k in (0, 1)]==[[12, 13], [14, 15]]   # the same samples as one process, in order
    a,b = (eval((tmp_path/f'minutes-{k}.txt').read_text()) for k in (0, 1)); assert a[0]==b[0]>0 and min(a[1], b[1])>=1.2
    assert all((tmp_path/f'stopped-{k}.txt').exists() and (tmp_path/f'pieces-{k}.txt').exists() for k in (0, 1)) and checkpoints(tmp_path/'ctrl')==['step-00000010']
    assert checkpoints(tmp_path/'swap')[-1]=='step-00000008' and processes('swap', 8)==2
    with pytest.raises(PowerCut): fit(small(), at_step(16, cut), loss, tmp_path/'swap', steps=STEPS, batch=4, lr=.02, warmup=4, precision='no', log_every=4, progress=False, save_minutes=0)
    assert processes('swap', 16)==1
    t = time.monotonic(); r = crew(tmp_path, 'second'); assert r.returncode!=0 and time.monotonic()-t<300     # one was killed: the job ends, and says so
    assert processes('swap')==2 and near(one, of('swap')), '2 -> 1 -> 2 processes'
    assert 'goes on from the last checkpoint' in (tmp_path/'said.txt').read_text() if (tmp_path/'said.txt').exists() else 'Signal 9 (SIGKILL)' in r.stderr
    assert checkpoints(tmp_path/'lost')[-1]=='step-00000013' and processes('lost', 13)==2
    assert near(one, of('lost')) and processes('lost')==1                               # and goes on alone

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
