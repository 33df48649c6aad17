"What is measured must be right, must get worse when the model does, and must say what is wrong with bad input."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gamengen_nb.core import ConfigError, DataError, rng, to_float, to_uint8, view_crop
from gamengen_nb.core import ActionSpec
from gamengen_nb.dataset import Episode, RandomPolicy, record, write_episode
from gamengen_nb.metrics import (CAP, Held, action_test, autoregressive, bootstrap, Calls, gradient_energy, jpeg_psnr, load_held, psnr, sharpness, ssim,
                                 teacher_forced)
from gamengen_nb.probes import FrameStatistics, RestPolicy, frechet, judge_window, real_to_real, real_turns, rests, stillness, turn_probes
from gamengen_nb.report import evaluate, verdicts

SPEC = ActionSpec(('TURN_LEFT', 'TURN_RIGHT', 'ATTACK'), exclusive=(('TURN_LEFT', 'TURN_RIGHT'),))

def enc(frames): return F.pixel_unshuffle(to_float(frames, pad_to=-(-frames.shape[1]//8)*8), 8) # loses nothing
def dec_for(height): return lambda z: to_uint8(F.pixel_shuffle(z, 8), height=height)
def copy(ctx, actions, samples): return ctx[:,-1]

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "A few lives of the real game, and rests in it."
    from gamengen_nb.env import DoomEnv
    folder = tmp_path_factory.mktemp('real'); env = DoomEnv('defend_the_line')
    record(env, RandomPolicy(env.action_spec.table()), folder/'held', episodes=3, seed=9001, progress=False)
    record(env, RestPolicy(env.action_spec.table(), play=12, rest=40), folder/'rest', frames=250, seed=9301, progress=False)
    env.close()
    return folder

@pytest.fixture(scope='module')
def held(real): return load_held(real/'held')

def toy_episode(n=40, h=60, w=80, spec=SPEC, seed=9000, number=0, frames=None):
    g = rng('toy', number); x = g.integers(0, 256, (n, h, w, 3), np.uint8) if frames is None else frames
    meta = dict(id='0'*16, seed=seed, stream=0, n=number, scenario='toy', skill=None, frame_tics=2, action_spec=spec.to_dict(), variable_names=[], source='random')
    return Episode(x, spec.table()[g.integers(0, len(spec.table()), n)], np.zeros(n, np.float32), np.zeros((n, 0), np.float32), True, False, meta)

# ---- against other people's code
def test_psnr_equals_torchmetrics_and_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio
    from torchmetrics.functional.image import peak_signal_noise_ratio as tm
    a = rng('a').integers(0, 256, (5, 48, 64, 3), np.uint8); b = np.clip(a+rng('b').normal(0, [[[[2]]], [[[5]]], [[[10]]], [[[30]]], [[[90]]]], a.shape), 0, 255).astype(np.uint8)
    t = lambda v: torch.from_numpy(v).movedim(-1, 1).float()
    assert np.allclose(psnr(a, b), tm(t(a), t(b), data_range=255., dim=(1, 2, 3), reduction='none').numpy(), atol=1e-4)
    assert np.allclose(psnr(a, b), [peak_signal_noise_ratio(x, y, data_range=255) for x,y in zip(a, b)], atol=1e-4)
    assert psnr(a, a).tolist()==[CAP]*5

def test_ssim_equals_scikit_image_and_the_map_of_torchmetrics():
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure as tm
    smooth = np.linspace(0, 255, 64)[None,None,:,None]*np.ones((1, 48, 1, 3))
    for a in (rng('a').integers(0, 256, (2, 48, 64, 3), np.uint8), smooth.astype(np.uint8), np.full((1, 48, 64, 3), 250, np.uint8)):
        b = np.clip(a+rng('b').normal(0, 20, a.shape), 0, 255).astype(np.uint8); t = lambda v: torch.from_numpy(v).movedim(-1, 1).double()
        assert np.allclose(ssim(a, b), [structural_similarity(x, y, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False) for x,y in zip(a, b)], atol=1e-4)
        full = tm(t(a), t(b), data_range=255., return_full_image=True)[1]
        assert np.allclose(ssim(a, b), full[...,5:-5,5:-5].mean((1, 2, 3)).numpy(), atol=1e-4)

# ---- worse models score worse
def test_every_score_falls_with_the_dose(held):
    x = held.frames[20:60:4]; g = rng('dose')
    def blur(v, s):
        r = int(3*s+.5); k = torch.exp(-torch.arange(-r, r+1)**2/(2*s*s)); k /= k.sum(); v = F.pad(torch.from_numpy(v).movedim(-1, 1).float(), (r,)*4, mode='replicate').flatten(0, 1)[:,None]
        return F.conv2d(F.conv2d(v, k.view(1, 1, 1, -1)), k.view(1, 1, -1, 1))[:,0].unflatten(0, (-1, 3)).round().byte().movedim(1, -1).numpy()
    blurred = [x]+[blur(x, s) for s in (.5, 1, 2)]; noisy = [x]+[np.clip(x+g.normal(0, s, x.shape), 0, 255).astype(np.uint8) for s in (5, 15, 45)]
    for films in (blurred, noisy):
        for f in (psnr, ssim): assert (np.diff([f(v, x).mean() for v in films])<0).all()
    assert (np.diff([sharpness(v, x) for v in blurred])<0).all()
    assert (np.diff([gradient_energy(v).mean() for v in noisy])>0).all()
    q = [jpeg_psnr(x, k).mean() for k in (20, 30, 50, 75)]
    assert (np.diff(q)>0).all() and 24<q[1]<27

def test_teacher_forcing_sees_alignment_and_the_action_test_sees_deafness(held):
    z = held.latents(enc); act = held.rows.actions; dec = dec_for(120)
    def oracle(heed):
        def predict(ctx, actions, samples):
            i = torch.tensor(samples); wrong = (actions[:,-1]!=torch.from_numpy(act[i-1])).any(1).float()[:,None,None,None]
            assert torch.equal(ctx[:,-1], z[i-1]) # the newest context frame is the one before
            return z[i]*(1-heed*wrong)
        return predict
    r = teacher_forced(held, enc, dec, oracle(.3), 4, n=16)
    assert r['psnr']['frame']['all']['model']==CAP and r['action_test']['cost']['frame'][0]>10
    costs = [action_test(held, Calls(enc, dec, oracle(h)), 4, 16)['cost']['frame'][0] for h in (0, .1, .4)]
    assert costs[0]==0 and costs[0]<costs[1]<costs[2]

def test_same_seed_same_report(held):
    dec = dec_for(120); one,two = (teacher_forced(held, enc, dec, copy, 4, n=12, seed=3) for _ in range(2))
    one.pop('films'); two.pop('films'); assert one==two

def test_bootstrap_resamples_episodes_not_frames():
    v = np.repeat([20., 30.], 200); by_life,by_frame = bootstrap(v, np.repeat([0, 1], 200)),bootstrap(v, np.arange(400))
    assert by_life[0]==by_frame[0]==25 and by_life[2]-by_life[1]>4*(by_frame[2]-by_frame[1])

# ---- probes on the real game
def test_the_turn_instrument_is_right_on_real_frames(held):
    r = real_turns(held)['lives']
    assert r['n']>=20 and r['right']>=.98 and 5<r['degrees']<7.5

def test_turn_probes_tell_right_wrong_and_frozen(held):
    def engine(sign):
        def predict(ctx, actions, samples):
            x = F.pixel_shuffle(ctx[:,-1], 8); d = (actions[:,-1,0]-actions[:,-1,1])*sign
            return F.pixel_unshuffle(torch.stack([torch.roll(v, int(9*k), -1) for v,k in zip(x, d)]), 8)
        return predict
    assert [turn_probes(held, enc, dec_for(120), engine(s), 4, starts=3)['right'] for s in (1, -1, 0)]==[1, 0, 0]

def test_real_runs_are_alive_and_collapsed_ones_are_not(held):
    stats = FrameStatistics(held.frames); real = real_to_real(held, stats, 5, 30); ref = stats(held.frames)
    rows = np.arange(5)[:,None]*(len(held.frames)//5)+np.arange(30); film,act = held.frames[rows],held.rows.actions[rows[:,:-1]]
    w = lambda f: judge_window(f, act, stats, ref, real, held.spec)
    good,frozen,same,fade = w(film),w(film[:,[0]*30]),w(film[[0]*5]),w((film*.4).astype(np.uint8))
    assert good['frechet']<2 and good['differ']
    assert not frozen['alive'] and not same['differ'] and fade['frechet']>good['frechet']
    assert frechet(ref, ref)<1e-6<frechet(ref, stats(film[0]))

def test_stillness_sees_melting_and_creeping(real):
    rest = load_held(real/'rest'); dec = dec_for(120); s = rests(rest, 34)
    assert len(s)>=3 and (rest.rows.actions[s[:,None]+np.arange(-4, 34)]==0).all()
    creep = lambda ctx, actions, samples: F.pixel_unshuffle(torch.roll(F.pixel_shuffle(ctx[:,-1], 8), 1, -1), 8)
    photo,melt,moved = (stillness(rest, enc, dec, f, 4, steps=34, starts=3) for f in (copy, lambda ctx, actions, samples: ctx[:,-1]*.95, creep))
    assert photo['held'] and not melt['held'] and moved['checks'][-1]['neural turn']>3 and moved['calm_gap']<photo['calm_gap']

# ---- the report
def test_the_report_is_whole_self_contained_and_resumes(real, tmp_path):
    page = evaluate(enc, dec_for(120), copy, real/'held', tmp_path, SPEC, 4, rest=real/'rest', about=dict(model='photo'), progress=False)
    html = page.read_text(encoding='utf-8'); got = json.loads((tmp_path/'metrics.json').read_text())
    assert '://' not in html and '<script' not in html and html.count('data:image/')>=8 and 'photo' in html
    assert {'machine' if k=='processor' else k for k in got['about']}>={'machine', 'seed', 'commit', 'seconds', 'torch'}
    assert {'teacher', 'rollout', 'real turns', 'turns', 'alive', 'still', 'about', 'verdicts'}==set(got)
    files = {p:p.stat().st_mtime_ns for p in (tmp_path/'sections').glob('*.json')}
    (tmp_path/'sections'/'turns.json').write_text('{"key": ') # a kill in the middle can't do this, a bad disk can
    evaluate(enc, dec_for(120), copy, real/'held', tmp_path, SPEC, 4, rest=real/'rest', progress=False)
    again = {p:p.stat().st_mtime_ns for p in (tmp_path/'sections').glob('*.json')}
    assert [p.stem for p in files if files[p]!=again[p]]==['turns']
    assert json.loads((tmp_path/'metrics.json').read_text())['turns']['right']==0

def test_small_frames_and_other_buttons(tmp_path):
    spec = ActionSpec(('MOVE_LEFT', 'MOVE_RIGHT', 'ATTACK'), exclusive=(('MOVE_LEFT', 'MOVE_RIGHT'),))
    for k in range(3): write_episode(toy_episode(spec=spec, number=k), tmp_path/'held'/'stream-0000'/f'ep-{k:06d}.parquet')
    page = evaluate(enc, dec_for(60), copy, tmp_path/'held', tmp_path/'out', spec, 4, progress=False) # 80×60, nothing turns, nobody rests
    got = json.loads((page.parent/'metrics.json').read_text())
    assert got['turns']['right'] is None and 'still' not in got and [v for v in got['verdicts'] if v['ok'] is None]

def test_a_bar_just_missed_is_missed():
    from gamengen_nb.core import TERMS
    ok = lambda x: verdicts(dict(turns=dict(right=x)))[0]['ok']
    assert ok(TERMS.turn_right) and not ok(TERMS.turn_right-1e-6)

# ---- bad input: one sentence
def one_sentence(e): return '\n' not in str(e.value) and 20<len(str(e.value))<300

@pytest.mark.parametrize('what', ['nan frames', 'shapes', 'empty folder', 'no episodes', 'one frame', 'mixed games', 'nan model', 'short lives', 'other buttons', 'budget'])
def test_bad_input(what, held, real, tmp_path):
    dec = dec_for(120); nan = lambda ctx, actions, samples: ctx[:,-1]*float('nan')
    (tmp_path/'empty').mkdir()
    do = {'nan frames':lambda: psnr(held.frames[:2]*np.float32('nan'), held.frames[:2]), 'shapes':lambda: ssim(held.frames[:2], held.frames[:3]),
        'empty folder':lambda: load_held(tmp_path/'empty'), 'no episodes':lambda: Held([]), 'one frame':lambda: Held([toy_episode(n=1)]),
        'mixed games':lambda: Held([toy_episode(), toy_episode(h=64, number=1)]), 'nan model':lambda: teacher_forced(held, enc, dec, nan, 4, n=4),
        'short lives':lambda: autoregressive(held, enc, dec, copy, 4, steps=9999), 'other buttons':lambda: evaluate(enc, dec, copy, real/'held', tmp_path/'o', ActionSpec(('ATTACK',)), 4, progress=False),
        'budget':lambda: evaluate(enc, dec, copy, real/'held', tmp_path/'o', SPEC, 4, budget='endless', progress=False)}[what]
    with pytest.raises(ConfigError if what=='budget' else DataError) as e: do()
    assert one_sentence(e)
