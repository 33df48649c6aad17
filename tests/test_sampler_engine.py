"""The sampler against diffusers; model folders that must be refused; the neural env's promises."""
import copy, json, warnings

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gamengen_nb import backends as K, engine as E, pipeline as P
from gamengen_nb.core import ActionError, ActionSpec, CheckpointError, ConfigError, DataError, GamegenError, alpha_bar, normal, preset, rng, seal
from gamengen_nb.latents import SmallVAE
from gamengen_nb.sampler import ddim, ddim_step, guide, guided, timesteps
from gamengen_nb.unet import make_unet

CFG = preset('tiny')
SPEC = ActionSpec(('TURN_LEFT', 'TURN_RIGHT', 'ATTACK'), exclusive=(('TURN_LEFT', 'TURN_RIGHT'),))
L,R,N = SPEC.press('TURN_LEFT'),SPEC.press('TURN_RIGHT'),SPEC.noop

def parts(seed=0, K=3):
    "A tiny random model: networks, meta, clips."
    torch.manual_seed(seed); unet,vae = make_unet(CFG, SPEC.dim),SmallVAE(CFG.latent_channels, CFG.vae_widths)
    torch.nn.init.normal_(unet.level_embedding.weight)
    meta = dict(format=1, scenario='defend_the_line', context=CFG.context, frame_tics=2, action_spec=SPEC.to_dict(), height=CFG.height, width=CFG.width, pad_height=CFG.pad_height,
        prediction_type='v_prediction', spacing='trailing', sample_steps=4, noise_level=.1, guidance=1.)
    clips = dict(latents=normal((CFG.context, CFG.latent_channels, *CFG.latent_hw), 'clips', samples=range(K)).half(), actions=torch.zeros(K, CFG.context, SPEC.dim))
    return unet,vae,meta,clips

@pytest.fixture(scope='module')
def model(tmp_path_factory): return E.save_pipeline(tmp_path_factory.mktemp('model')/'tiny', *parts(), card='# tiny\n', dtype=torch.bfloat16)

@pytest.fixture(scope='module')
def pipe(model): return E.load_pipeline(model)

@pytest.fixture
def copied(model, tmp_path):
    import shutil
    return shutil.copytree(model, tmp_path/'copy')

@pytest.fixture
def env(pipe): return E.NeuralDoom(pipe, backend='eager')

def film(env, keys): return np.stack([env.step(k)[0] for k in keys])

# ---- sampler
MIX = torch.linalg.qr(torch.from_numpy(rng('mix').standard_normal((80, 80)).astype(np.float32)))[0]
def random_net(z, t): return (z.reshape(-1, 80)@MIX).reshape(z.shape).add(t/500).sin()

@pytest.mark.parametrize('steps', [1, 2, 4, 5, 8, 10, 20])
def test_ddim_equals_diffusers(steps):
    from diffusers import DDIMScheduler
    s = DDIMScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, timestep_spacing='trailing', prediction_type='v_prediction', clip_sample=False, set_alpha_to_one=True)
    s.set_timesteps(steps); assert timesteps(steps)==s.timesteps.tolist()
    x = normal((4, 8, 10), 'net', samples=range(3)); y = x
    for t in s.timesteps: y = s.step(random_net(y, int(t)), t, y).prev_sample
    assert (ddim(random_net, x, steps)-y).abs().max()<1e-5

def test_timesteps_are_trailing():
    assert timesteps(4)==[999, 749, 499, 249] and timesteps(1)==[999] and timesteps(1000)[-1]==0
    for k in (3, 7, 600, 999): assert len(set(timesteps(k)))==k and timesteps(k)==sorted(timesteps(k), reverse=True)

@pytest.mark.parametrize('steps', [0, -4, 1001, 2.5, True])
def test_a_bad_number_of_steps_is_refused(steps):
    with pytest.raises(ConfigError, match='whole number from 1 to 1000'): timesteps(steps)

def test_one_step_is_the_x0_formula_and_the_last_alpha_is_one():
    abar = alpha_bar(); z0,eps = normal((2, 4, 5), 'x0', samples=[0, 1]); a = abar[999]
    z,v = a.sqrt()*z0+(1-a).sqrt()*eps, a.sqrt()*eps-(1-a).sqrt()*z0
    assert (ddim_step(z, v, 999, -1, abar)-z0).abs().max()<1e-5
    assert (ddim(lambda *_: v, z, 1)-z0).abs().max()<1e-5
    big = ddim(lambda z,t: torch.zeros_like(z)-9, torch.zeros(1, 1, 2, 2), 1); assert big.max()>5 # nothing is clipped

def test_guidance():
    one,two = (lambda z,t: torch.ones(2)),(lambda z,t: torch.full((2,), 2.))
    assert torch.equal(guide(two, one, 1.5)(None, 0), torch.tensor([2.5, 2.5])) and guide(two, one, 1.) is two
    for bad in (-1., float('nan'), float('inf')):
        with pytest.raises(ConfigError, match='guidance scale'): guide(two, one, bad)

def test_guidance_in_one_call_equals_two_calls():
    past = normal((3, 4, 8, 10), 'past', samples=range(3)); x = normal((4, 8, 10), 'net', samples=range(3)); calls = []
    def net(z, t, c): calls.append(len(z)); return random_net(z, t)+c.mean(1).tanh()
    two = guide(lambda z,t: net(z, t, past), lambda z,t: net(z, t, 0*past), 1.5); want = ddim(two, x, 4); calls.clear()
    assert (ddim(guided(net, past, 1.5), x, 4)-want).abs().max()<1e-5 and calls==[6]*4
    calls.clear(); ddim(guided(net, past), x, 4); assert calls==[3]*4
    with pytest.raises(ConfigError, match='guidance scale'): guided(net, past, float('nan'))

# ---- the model folder
def test_a_folder_round_trips(model, pipe):
    unet,vae,meta,clips = parts()
    assert pipe.meta==meta and pipe.spec==SPEC and pipe.unet.dtype==torch.float32 and not pipe.unet.training
    for k,v in unet.state_dict().items(): assert torch.equal(v.bfloat16().float(), pipe.unet.state_dict()[k]), k
    for k in clips: assert torch.equal(clips[k], pipe.clips[k])
    index = json.loads((model/'model_index.json').read_text())
    assert index['unet']==['gamengen_nb.unet', 'ActionUNet'] and index['scheduler']==['diffusers', 'DDIMScheduler']
    from diffusers import DDIMScheduler
    s = DDIMScheduler.from_pretrained(model/'scheduler'); assert s.config.prediction_type=='v_prediction' and s.config.timestep_spacing=='trailing' and not s.config.clip_sample
    assert not list(model.parent.glob('.*')), 'no temporary folder is left'

def files(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())

def test_every_flipped_bit_is_refused(copied):
    for name in files(copied):
        f = copied/name; good = f.read_bytes()
        for i,share in enumerate((0, .001, .25, .5, .75, .999)):
            bad = bytearray(good); at = min(int(share*len(bad)), len(bad)-2); bad[at] ^= 1<<(i+at)%8; f.write_bytes(bad)
            with pytest.raises(CheckpointError) as e: E.load_pipeline(copied)
            assert '\n' not in str(e.value), (name, share)
        f.write_bytes(good)
    E.load_pipeline(copied)

def test_truncated_and_missing_files_are_refused(copied):
    for name in files(copied):
        f = copied/name; good = f.read_bytes()
        for n in (0, len(good)//2, len(good)-1):
            if name=='sha256.json' and n==len(good)-1: continue # the final newline says nothing
            f.write_bytes(good[:n])
            with pytest.raises(CheckpointError): E.load_pipeline(copied)
        f.unlink()
        with pytest.raises(CheckpointError, match='missing'): E.load_pipeline(copied)
        f.write_bytes(good)
    with pytest.raises(CheckpointError, match='no checkpoint folder'): E.load_pipeline(copied/'nowhere')

def test_a_model_for_something_else_is_refused(model):
    E.load_pipeline(model, expect_spec=SPEC, expect_frame_tics=2, expect_context=CFG.context)
    for kw,what in [(dict(expect_spec=ActionSpec(('MOVE_LEFT', 'MOVE_RIGHT', 'ATTACK'))), 'action spec'), (dict(expect_spec=ActionSpec(SPEC.buttons)), 'action spec'),
                    (dict(expect_frame_tics=4), 'clock'), (dict(expect_context=64), 'context T')]:
        with pytest.raises(CheckpointError, match=what): E.load_pipeline(model, **kw)

def rewrite(folder, **changes):
    "Change gamengen.json and seal again: a wrong model, undamaged."
    m = json.loads((folder/'gamengen.json').read_text()); m.update(changes)
    (folder/'gamengen.json').write_text(json.dumps({k:v for k,v in m.items() if v is not None})); seal(folder)

@pytest.mark.parametrize('changes,what', [(dict(prediction_type='epsilon'), 'prediction_type'), (dict(spacing='leading'), 'spacing'), (dict(format=99), 'format'), (dict(context=9), 'context of the U-Net'),
    (dict(action_spec=ActionSpec(('ATTACK',)).to_dict()), 'number of actions'), (dict(action_spec={'keys': []}), 'action spec'), (dict(pad_height=128), 'latent size'), (dict(guidance=None), 'lacks guidance')])
def test_parts_that_disagree_are_refused(copied, changes, what):
    rewrite(copied, **changes)
    with pytest.raises(CheckpointError, match=what): E.load_pipeline(copied)

def test_weights_of_another_shape_or_name_are_refused(copied):
    f = copied/'unet'/'diffusion_pytorch_model.safetensors'; w = load_file(str(f))
    def put(w): save_file({k:v.contiguous() for k,v in w.items()}, str(f), metadata=dict(format='pt')); seal(copied)
    for change in (lambda w: w.update(position=w['position'][:2]), lambda w: w.pop('position'), lambda w: w.update(extra=torch.zeros(1))):
        v = dict(w); change(v); put(v)
        with pytest.raises(CheckpointError, match='unet'): E.load_pipeline(copied)
    put(w); E.load_pipeline(copied)
    index = json.loads((copied/'model_index.json').read_text()); index['vae'] = ['os', 'system']; (copied/'model_index.json').write_text(json.dumps(index)); seal(copied)
    with pytest.raises(CheckpointError, match='does not know'): E.load_pipeline(copied)
    clips = load_file(str(copied/'clips.safetensors'))
    save_file({k:v[:,1:].contiguous() for k,v in clips.items()}, str(copied/'clips.safetensors'))
    index['vae'] = ['gamengen_nb.latents', 'SmallVAE']; (copied/'model_index.json').write_text(json.dumps(index)); seal(copied)
    with pytest.raises(CheckpointError, match='start latents'): E.load_pipeline(copied)

def test_a_failed_save_leaves_the_old_model(copied, monkeypatch):
    unet,vae,meta,clips = parts(1)
    with pytest.raises(CheckpointError, match='context'): E.save_pipeline(copied, unet, vae, meta|dict(context=5), clips)
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(P, 'save_file', full)
    with pytest.raises(DataError, match='Could not write.*older model there is untouched'): E.save_pipeline(copied, unet, vae, meta, clips)
    E.load_pipeline(copied); assert not list(copied.parent.glob('.*'))

# ---- artifacts
def test_artifacts_are_listed_fetched_and_checked(copied, tmp_path, monkeypatch):
    monkeypatch.setenv('GAMENGEN_HOME', str(tmp_path/'cache')); monkeypatch.setattr(P, 'repo_data', lambda: None)
    with pytest.raises(CheckpointError, match='gamengen fetch'): E.artifact('copy')
    (tmp_path/'note.txt').write_text('hello'); E.list_artifact(tmp_path/'note.txt', 'CC0-1.0'); item = E.list_artifact(copied); E.list_artifact(copied)
    listed = json.loads((tmp_path/'artifacts.json').read_text())['artifacts']
    assert [a['name'] for a in listed]==['copy', 'note.txt'] and item['bytes']==sum(p.stat().st_size for p in copied.rglob('*') if p.is_file())
    got = E.fetch(tmp_path); assert E.artifact('copy')==got['copy'] and E.artifact('note.txt').read_text()=='hello'
    E.NeuralDoom(got['copy'], backend='eager').reset(seed=0)
    f = got['copy']/'vae'/'config.json'; f.write_text(f.read_text()+' ')
    with pytest.raises(CheckpointError, match='damaged'): E.artifact('copy')
    assert E.fetch(tmp_path.as_uri(), ['copy'])=={'copy':got['copy']} and E.artifact('copy') and E.artifact('note.txt') # mended; the rest stays listed
    (copied/'gamengen.json').write_text('{}'); (got['copy']/'README.md').unlink()
    with pytest.raises(DataError, match='does not match its SHA-256'): E.fetch(tmp_path)
    with pytest.raises(DataError, match='has no moon'): E.fetch(tmp_path, ['moon'])
    with pytest.raises(DataError, match='Could not get artifacts.json'): E.fetch(tmp_path/'nowhere')

def test_fetch_writes_nothing_outside_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('GAMENGEN_HOME', str(tmp_path/'cache')); src = tmp_path/'src'; (src/'bad').mkdir(parents=True)
    from gamengen_nb.core import sha256
    (src/'bad'/'sha256.json').write_text(json.dumps({'../../evil':'0'*64}))
    (src/'artifacts.json').write_text(json.dumps(dict(artifacts=[dict(name='bad', kind='folder', sha256=sha256(src/'bad'/'sha256.json'), bytes=1, licence='x')])))
    with pytest.raises(DataError, match='outside'): E.fetch(src)
    (src/'artifacts.json').write_text(json.dumps(dict(artifacts=[dict(name='../bad', kind='file', sha256='0', bytes=1, licence='x')])))
    with pytest.raises(DataError, match='has no'): E.fetch(src)

# ---- the env
def test_both_checkers(model):
    from gymnasium.utils.env_checker import check_env
    from stable_baselines3.common.env_checker import check_env as sb3_check
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        made = gymnasium.make('gamengen/NeuralDoom-v0', model=model, backend='eager', render_mode='rgb_array')
        check_env(made.unwrapped); sb3_check(made.unwrapped)
    obs,info = made.reset(seed=0); assert obs.shape==(CFG.height, CFG.width, 3) and obs.dtype==np.uint8
    obs,r,term,trunc,info = made.step(made.action_space.sample())
    assert (r, term, trunc)==(0., False, False) and info['reward_known'] is False and info['tic']==2 and np.array_equal(made.render(), obs)
    u = made.unwrapped; assert u.action_spec==SPEC and u.frame_tics==2 and u.metadata['render_fps']==17.5 and set(u.timing)=={'denoise', 'decode', 'total'}

def test_reset_is_deterministic_over_50_steps(env):
    keys = [SPEC.table()[int(rng('keys', i//3).integers(len(SPEC.table())))] for i in range(50)]
    a0,_ = env.reset(seed=3); a = film(env, keys); b0,_ = env.reset(seed=3); b = film(env, keys)
    assert np.array_equal(a0, b0) and np.array_equal(a, b)
    env.reset(seed=4); assert not np.array_equal(film(env, keys[:3]), a[:3])
    env.reset(seed=3); first = env.reset()[0], film(env, keys[:2]); env.reset(seed=3); again = env.reset()[0], film(env, keys[:2]) # the next unseeded game follows from the seed, too
    assert all(np.array_equal(x, y) for x,y in zip(first, again))

def test_a_state_continues_to_the_bit(env, pipe):
    env.reset(seed=1); film(env, [L, L, N]); s = env.get_state(); keep = copy.deepcopy(s); want = film(env, [R, N, L, SPEC.press('ATTACK')]); game2 = env.reset()[0]
    other = E.NeuralDoom(pipe, backend='eager'); other.reset(seed=77); other.set_state(s)
    assert np.array_equal(film(other, [R, N, L, SPEC.press('ATTACK')]), want) and np.array_equal(other.reset()[0], game2)
    assert all(np.array_equal(s[k], keep[k]) for k in ('latents', 'actions')), 'playing on must not change a saved state'
    plain = json.loads(json.dumps({k:v.tolist() if isinstance(v, np.ndarray) else v for k,v in s.items()})) # through JSON, exactly
    other.set_state(plain); assert np.array_equal(film(other, [R, N, L, SPEC.press('ATTACK')]), want)
    for bad in ({}, s|dict(latents=s['latents'][:,1:])):
        with pytest.raises(DataError): env.set_state(bad)

def test_keys_act_at_once_and_their_order_counts(env):
    env.reset(seed=0); s = env.get_state(); out = []
    for k in (L, R): env.set_state(s); env.step(k); out.append(env.get_state()['latents'][0,-1])
    assert np.abs(out[0]-out[1]).max()>1e-5, 'the key given to step acts on the frame that step returns'
    out = []
    for order in ([L, R], [R, L]): t = copy.deepcopy(s); t['actions'][0,1:3] = order; env.set_state(t); env.step(N); out.append(env.get_state()['latents'][0,-1])
    assert np.abs(out[0]-out[1]).max()>1e-5, 'two swapped actions are not the same past'

def test_the_window_is_aligned(env, pipe):
    env.reset(seed=0, options=dict(clip=2)); s = env.get_state(); assert np.array_equal(s['latents'][0], pipe.clips['latents'][2].float().numpy())
    seen = []; real = env._net.denoise
    def spy(z, t, ctx, a, level): seen.append((t, ctx.clone(), a.clone(), int(level))); return real(z, t, ctx, a, level)
    env._net.denoise = spy; env.noise_level = 0.; env.step(L); env.step(R)
    assert [t for t,*_ in seen]==[999, 749, 499, 249]*2
    _,ctx,a,level = seen[4]; assert np.array_equal(a[0].numpy()[-2:], [L, R]) and level==0
    assert np.array_equal(ctx[0,:-1].numpy(), s['latents'][0,1:]), 'no noise at level 0, oldest latent dropped'
    env.noise_level = .35; env.step(N); ctx,level = seen[8][1],seen[8][3]; clean = env.get_state()['latents'][0,:-1]
    assert level==5 and abs(float((ctx[0,1:]-torch.from_numpy(clean)).std())-.35)<.03, 'noise of the level is really added, and the network is told'
    assert not torch.equal(ctx[0,1:], torch.from_numpy(clean)) and np.array_equal(a[0,-1].numpy(), R)

def test_guidance_uses_the_training_null(pipe):
    env = E.NeuralDoom(pipe, backend='eager', guidance=1.5, noise_level=.2, steps=1); env.reset(seed=0); seen = []; real = env._net.denoise
    def spy(z, t, ctx, a, level): seen.append((ctx.clone(), a.clone(), level.tolist())); return real(z, t, ctx, a, level)
    env._net.denoise = spy; env.step(L); (c,a,l), = seen     # one call of two samples: the past, then its null
    assert c.shape[0]==2 and (c[0]!=0).all() and (c[1]==0).all() and torch.equal(a[0], a[1]) and l==[2, 2] # zero in every channel of every past frame; the actions stay

@pytest.mark.parametrize('bad', [[1, 0], [0, 0, 2], [0, .5, 0], 'left', [0, float('nan'), 0], None, [[1, 0, 0]]])
def test_a_wrong_action_is_refused_and_changes_nothing(env, bad):
    env.reset(seed=0); s = env.get_state()
    with pytest.raises(ActionError): env.step(bad)
    assert all(np.array_equal(s[k], env.get_state()[k]) for k in ('latents', 'actions', 'step'))

def test_wrong_settings_are_refused(pipe, env, model):
    for kw,what in [(dict(steps=0), 'sampling steps'), (dict(guidance=-1), 'guidance scale'), (dict(noise_level=.9), 'noise level'), (dict(backend='warp'), 'no backend'), (dict(render_mode='human'), 'render_mode')]:
        with pytest.raises(ConfigError, match=what): E.NeuralDoom(pipe, **dict(dict(backend='eager'), **kw))
    with pytest.raises(ConfigError, match='clips 0 to 2'): env.reset(options=dict(clip=3))
    with pytest.raises(GamegenError, match='reset'): env.step(N)
    with pytest.raises(CheckpointError): E.NeuralDoom(model/'nowhere')

def test_a_mouse_turns_too(tmp_path):
    spec = ActionSpec(('ATTACK', 'TURN_LEFT_RIGHT_DELTA', 'MOVE_LEFT'), ('binary', 'delta', 'binary'), (1., 30., 1.)); unet,vae,meta,clips = parts()
    env = E.NeuralDoom(E.save_pipeline(tmp_path/'mouse', unet, vae, meta|dict(action_spec=spec.to_dict()), clips), backend='eager'); env.reset(seed=0)
    assert isinstance(env.action_space, gymnasium.spaces.Box) and env.action_space.low.tolist()==[0, -30, 0]
    s = env.get_state(); a = env.step([0, 7.5, 1])[0]; env.set_state(s); assert not np.array_equal(env.step([0, -7.5, 1])[0], a)

# ---- backends
def test_openvino_agrees_with_eager(pipe):
    pytest.importorskip('openvino'); eager = K.Eager(pipe); off = lambda x,y: float((x-y).square().mean().sqrt()/y.std())
    ctx,a = pipe.clips['latents'][:1].float(),torch.from_numpy(L).expand(1, CFG.context, 3); z = ctx[:,-1]
    for precision,tol in (('f32', 1e-4), ('bf16', .03)): # share of the output's standard deviation
        fast = K.OpenVINO(pipe, precision=precision)
        for t in (999, 749, 499, 249, 0):
            for level in (0, 9):
                x = (z, t, ctx, a, torch.tensor([level])); assert off(fast.denoise(*x), eager.denoise(*x))<tol, (precision, t)
        assert off(fast.decode(z), eager.decode(z))<tol
        v = fast.denoise(z, 999, ctx, a, torch.tensor([0])); keep = v.clone(); fast.denoise(z*2, 0, ctx, a, torch.tensor([3])); assert torch.equal(v, keep), 'an answer must survive the next call'

def test_openvino_plays_and_time_per_frame_stays_flat(pipe):
    pytest.importorskip('openvino'); env = E.NeuralDoom(pipe, backend='openvino'); assert env.backend=='openvino'
    env.reset(seed=0); a = film(env, [L, N]); env.reset(seed=0); assert np.array_equal(film(env, [L, N]), a)
    slow = E.NeuralDoom(pipe, backend='eager'); slow.reset(seed=0); assert np.abs(film(slow, [L, N]).astype(int)-a).mean()<4 # levels of 255
    import tracemalloc
    ms = []; tracemalloc.start(); film(env, [N]*5); before = tracemalloc.get_traced_memory()[0]
    for _ in range(120): env.step(N); ms.append(env.timing['total'])
    grown = tracemalloc.get_traced_memory()[0]-before; tracemalloc.stop()
    assert grown<200_000, f'{grown} bytes more after 120 frames'
    assert np.quantile(ms[-40:], .2)<3*np.quantile(ms[:40], .2)+2 # the low quantile: other programs share the machine

def test_auto_picks_what_there_is(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv('GAMENGEN_HOME', str(tmp_path)); made = []
    monkeypatch.setattr(K, 'OpenVINO', lambda p, threads: made.append('openvino')); monkeypatch.setattr(K, 'Eager', lambda p, threads: made.append('eager'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False); monkeypatch.setattr(K, 'find_spec', lambda n: True); E.make_backend(pipe)
    (tmp_path/'bench.json').write_text('{"fastest": "eager"}'); E.make_backend(pipe)
    (tmp_path/'bench.json').write_text('{"fastest": "openvino"}'); monkeypatch.setattr(K, 'find_spec', lambda n: None)
    with pytest.warns(UserWarning, match='pip install openvino'): E.make_backend(pipe)
    assert made==['openvino', 'eager', 'eager']

def test_the_bench_reports_time_and_agreement(pipe, tmp_path, monkeypatch):
    pytest.importorskip('openvino'); monkeypatch.setenv('GAMENGEN_HOME', str(tmp_path)); r = E.bench_engine(pipe, n=5)
    assert r['eager']['latent_deviation']<1e-5 and r['openvino']['latent_deviation']<.05 and r['eager']['p50_ms']<=r['eager']['p99_ms']
    assert json.loads((tmp_path/'bench.json').read_text())['fastest'] in r
