"""Stable Diffusion 1.4's parts, on random stand-ins of its shape that the tests write: surgery, parity, VAE, cache, decoder, pipeline, and bad input."""
import json, os, pickle, shutil, subprocess, sys, time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from gamengen_nb import pipeline as P, pretrained as R
from gamengen_nb.core import CheckpointError, ConfigError, DataError, normal, preset
from gamengen_nb.decoder import generated_pairs, lpips_distance, tune_decoder
from gamengen_nb.diffusion import diffusion_loss
from gamengen_nb.engine import NeuralDoom
from gamengen_nb.latents import LatentData, SDVAE, decode_latents, encode_frames, encode_recording, fingerprint, load_vae, save_model, sd_vae, train_vae
from gamengen_nb.pretrained import fake_sd, part_folder, safe_files
from gamengen_nb.unet import ActionUNet, from_sd, load_unet, make_unet, sd_config, widen
from test_models import PAD, npys, one_sentence, recording

CFG = preset('tiny', context=8) # 80×60 frames, latents of 4×8×10
A,D = 3,32

@pytest.fixture(scope='module')
def sd(tmp_path_factory):
    "A small stand-in whose VAE has the scale factor that fits it."
    f = tmp_path_factory.mktemp('sd'); x = normal((3, PAD, 16), 'x', samples=range(20)).clamp(-1, 1)
    with torch.no_grad(): raw = float(sd_vae(fake_sd(f/'raw', scale=1.)).encode(x).std())
    return fake_sd(f/'sd', scale=1/raw)

def surgery(sd, **kw): torch.manual_seed(0); return from_sd(sd, CFG, kw.pop('action_dim', A), **kw).eval().requires_grad_(False)
def inputs(T=8): return normal((4, 8, 10), 'z', samples=[0, 1]),torch.tensor([999, 300]),normal((T, 4, 8, 10), 'ctx', samples=[0, 1]),torch.eye(A)[torch.arange(2*T).view(2, T)%A],torch.tensor([0, 9])


# --- surgery

def test_pretrained_weights_stay_and_the_context_starts_at_zero(sd):
    net,w = surgery(sd),load_file(sd/'unet'/'diffusion_pytorch_model.safetensors'); mine = net.unet.state_dict()
    assert set(mine)==set(w) and all(torch.equal(mine[k], w[k]) for k in w if k!='conv_in.weight')
    assert mine['conv_in.weight'].shape==(32, 4*9, 3, 3) and torch.equal(mine['conv_in.weight'][:,:4], w['conv_in.weight']) and not mine['conv_in.weight'][:,4:].any()
    assert not net.level_embedding.weight.any() and net.action_time is None and net.config.sd and net.config.change_std==0
    small = surgery(sd, ctx_std=.1).unet.conv_in.weight[:,4:]; assert 0<float(small.std())<.2*float(w['conv_in.weight'].std())
    assert all(p.device.type=='cpu' for p in [*net.parameters(), *net.buffers()])

def test_parity_with_the_source_for_every_past(sd):
    "Tokens by hand: actions as wide as a token, the identity as their embedding, no positions."
    net,source = surgery(sd, action_dim=D),UNet2DConditionModel.from_pretrained(sd/'unet').eval().requires_grad_(False)
    net.action_embedding.weight.copy_(torch.eye(D)); net.position.zero_(); z,t,ctx,_,level = inputs(); text = normal((8, D), 'text', samples=[0, 1])
    want = source(z, t, encoder_hidden_states=text).sample
    for past in (ctx, 0*ctx, 9*ctx): assert (net(z, t, past, text, level)-want).abs().max()<1e-5
    assert (net(z, t, ctx, -text, level)-want).abs().max()>1e-3 # the tokens do count

def test_slots_are_the_noised_latent_then_the_past_from_the_oldest(sd):
    net,source = surgery(sd),load_file(sd/'unet'/'diffusion_pytorch_model.safetensors')['conv_in.weight']; seen = []
    net.unet.conv_in.register_forward_hook(lambda m,x,y: seen.append((x[0], y))); z,t,ctx,a,level = inputs(); net(z, t, ctx, a, level)
    assert torch.equal(seen[-1][0], torch.cat([z, *ctx.unbind(1)], 1))
    for k in (0, 7): # a weight in slot 1+k reads past frame k, 0 the oldest
        w = widen(source, 8); w[:,4*(1+k):4*(2+k)] = source; net.unet.conv_in.weight.copy_(w); net(z, t, ctx, a, level)
        want = torch.nn.functional.conv2d(z+ctx[:,k], source, net.unet.conv_in.bias, padding=1); assert (seen[-1][1]-want).abs().max()<1e-5

def test_every_new_weight_learns_from_the_first_step(sd):
    net = from_sd(sd, CFG, A).train(); z,t,ctx,a,level = inputs()
    diffusion_loss(net, z, ctx, a, torch.randn_like(z), torch.randn_like(ctx), t, torch.tensor([.1, .7]), torch.ones(2)).backward()
    for p in (net.action_embedding.weight, net.position, net.level_embedding.weight): assert p.grad.abs().max()>0
    assert net.unet.conv_in.weight.grad[:,4:].abs().amax((0, 2, 3)).min()>0 # each of the 32 new channels

@pytest.mark.parametrize('patch', [0, 2], ids=['channels', 'tokens'])
def test_order_null_and_round_trip(sd, patch, tmp_path):
    net = surgery(sd, frame_patch=patch); z,t,ctx,a,level = inputs(); v = net(z, t, ctx, a, level)
    net.unet.conv_in.weight.add_(.01*torch.sin(torch.arange(net.unet.conv_in.weight.numel())).view_as(net.unet.conv_in.weight)) if not patch else None
    v = net(z, t, ctx, a, level); b = a.clone(); b[0,6:] = a[0,6:].flip(0); d = (net(z, t, ctx, b, level)-v).abs().amax((1, 2, 3))
    assert d[0]>1e-6 and d[1]==0                       # two actions swapped in time
    assert (net(z, t, ctx.flip(1), a, level)-v).abs().max()>1e-6 # two frames swapped
    back = load_unet(save_model(net, tmp_path/'unet'), expect_context=8).requires_grad_(False)
    assert torch.equal(back(z, t, ctx, a, level), v) and back.config.frame_patch==patch and back.config.sd
    if patch: assert net.unet.conv_in.in_channels==4 and torch.equal(net._frame_tokens(0*ctx), net.frame_position.flatten(0, 1).expand(2, -1, -1))
    seen = []; net.unet.register_forward_pre_hook(lambda m,x,k: seen.append((x[0], k['encoder_hidden_states'])), with_kwargs=True)
    diffusion_loss(net, z, ctx, a, z, ctx, t, torch.tensor([.7, .7]), torch.tensor([1., 0.]))
    if patch: assert torch.equal(seen[-1][1][1,8:], net.frame_position.flatten(0, 1)) # dropped: nothing but positions
    else: assert (seen[-1][0][1,4:]==0).all() and (seen[-1][0][0,4:]!=0).any()

def test_sharded_and_half_precision_sources_load_alike(sd, tmp_path):
    cut = fake_sd(tmp_path/'cut', max_shard_size='2MB'); assert len(safe_files(cut/'unet'))>2
    assert all(torch.equal(a, b) for a,b in zip(surgery(cut).unet.state_dict().values(), surgery(sd).unet.state_dict().values()))
    half = UNet2DConditionModel.from_pretrained(sd/'unet', torch_dtype=torch.float16); half.save_pretrained(tmp_path/'half'/'unet')
    net = surgery(tmp_path/'half'); assert net.dtype==torch.float32 and torch.isfinite(net(*inputs())).all()
    net = make_unet(CFG, A, str(sd)); assert net.config.sd and net.config.context==8

def test_old_checkpoints_have_no_new_keys():
    "State dicts of the small presets are what they were before the switches."
    net = make_unet(preset('tiny'), A); assert not [k for k in net.state_dict() if 'frame' in k] and net.config.frame_patch==0
    net.enable_gradient_checkpointing(); z,t,ctx,a,level = inputs(4); net.train()(z, t, ctx, a, level).sum().backward() # reaches the blocks inside

def test_full_size_names_and_shapes():
    "All 860 M parameters, on the meta device: what `from_sd` builds takes SD 1.4's tensors but for conv_in."
    with torch.device('meta'):
        ours = ActionUNet(64, 4, A, (32, 40), (320, 640, 1280, 1280), 2, 768, 8, action_in_time=False, sd=True).unet.state_dict(); theirs = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert [k for k,v in theirs.state_dict().items() if ours[k].shape!=v.shape]==['conv_in.weight'] and ours.keys()==theirs.state_dict().keys() and sum(p.numel() for p in theirs.parameters())==859_520_964


# --- bad input, one sentence each

def test_only_the_two_parts_are_read(sd, monkeypatch):
    opened = []; real = R.load_file; monkeypatch.setattr(R, 'load_file', lambda f: opened.append(f) or real(f))
    surgery(sd); sd_vae(sd); assert opened==[sd/'unet'/'diffusion_pytorch_model.safetensors']
    asked = []; monkeypatch.setattr(R, 'snapshot_download', lambda name, allow_patterns, **k: asked.extend(allow_patterns) or sd)
    surgery('CompVis/stable-diffusion-v1-4'); sd_vae('CompVis/stable-diffusion-v1-4')
    assert asked and all(p.startswith(('unet/', 'vae/')) and p.endswith(('config.json', '.safetensors', '.safetensors.index.json')) and 'fp16' not in p for p in asked)

OFF = "from gamengen_nb.unet import from_sd\nfrom gamengen_nb.core import preset, CheckpointError\nimport time; t = time.monotonic()\ntry: from_sd('owner/model-that-is-not-here', preset('tiny'), 3)\nexcept CheckpointError as e: print(time.monotonic()-t, e, sep='|')"

def test_a_hub_name_without_internet(tmp_path):
    "An address that nobody answers (RFC 5737): the refusal takes seconds, not minutes."
    env = os.environ|dict(HF_ENDPOINT='http://127.0.0.1:9', HF_HOME=str(tmp_path), HF_HUB_DISABLE_TELEMETRY='1')
    r = subprocess.run([sys.executable, '-c', OFF], capture_output=True, text=True, env=env, cwd=tmp_path); assert r.returncode==0, r.stderr[-500:]
    seconds,said = r.stdout.strip().split('|'); assert float(seconds)<20 and '\n' not in said and "'owner/model-that-is-not-here' is no folder here, and the hub cannot be reached" in said

@pytest.mark.parametrize('how', ['pickle', 'nothing', 'nowhere', 'cut', 'other class', 'other layout', 'heads', 'channels', 'own config', 'no config'])
def test_a_bad_unet_source_is_one_sentence(sd, tmp_path, how):
    f = shutil.copytree(sd, tmp_path/'sd'); u,cfg = f/'unet',CFG; w,c = u/'diffusion_pytorch_model.safetensors',json.loads((u/'config.json').read_text())
    conf = lambda **k: (u/'config.json').write_text(json.dumps(c|k)); word = ''
    if how=='pickle': w.rename(w.with_suffix('.bin')); word = 'pickles only'
    if how=='nothing': w.unlink(); word = 'holds no weights'
    if how=='nowhere': f = tmp_path/'nowhere'; word = 'There is no folder'
    if how=='cut': w.write_bytes(w.read_bytes()[:5000]); word = 'is damaged'
    if how=='other class': conf(_class_name='UNet3D'); word = 'a UNet2DConditionModel is needed'
    if how=='other layout': conf(use_linear_projection=True); word = 'its use_linear_projection is True'
    if how=='heads': conf(attention_head_dim=[5, 10, 20, 20]); word = 'attention_head_dim'
    if how=='channels': cfg = preset('laptop'); word = '4 latent channels, the preset on 12'
    if how=='own config': conf(block_out_channels=[32, 64, 64, 96]); word = 'does not fit its own config'
    if how=='no config': (u/'config.json').unlink(); word = 'config.json'
    with pytest.raises(CheckpointError) as e: from_sd(f, cfg, A)
    one_sentence(e, word)

def test_a_pickle_is_never_run(sd, tmp_path):
    class Bad:
        def __reduce__(self): return exec, (f"open({str(tmp_path/'mark')!r}, 'w').write('x')",)
    for part in ('unet', 'vae'):
        f = shutil.copytree(sd, tmp_path/part); w = f/part/'diffusion_pytorch_model.safetensors'; w.unlink(); w.with_suffix('.bin').write_bytes(pickle.dumps(Bad()))
        with pytest.raises(CheckpointError) as e: from_sd(f, CFG, A) if part=='unet' else sd_vae(f)
        one_sentence(e, 'can run code')
    assert not (tmp_path/'mark').exists()

@pytest.mark.parametrize('change,word', [(dict(latent_channels=16), 'have 16 channels, 4 are wanted'), (dict(scaling_factor=0), 'scale factor is 0'), (dict(scaling_factor=None), 'scale factor is None'),
    (dict(shift_factor=.1), 'shift 0.1'), (dict(block_out_channels=[32]*3), '4 times smaller'), (dict(_class_name='VQModel'), 'holds a VQModel'), (dict(norm_num_groups=7), 'its own config')])
def test_a_vae_that_does_not_fit_is_one_sentence(sd, tmp_path, change, word):
    f = shutil.copytree(sd, tmp_path/'sd'); c = f/'vae'/'config.json'; c.write_text(json.dumps(json.loads(c.read_text())|change))
    with pytest.raises(CheckpointError) as e: sd_vae(f)
    one_sentence(e, word)

def test_another_T_is_one_sentence(sd, tmp_path):
    f = save_model(surgery(sd), tmp_path/'unet')
    with pytest.raises(CheckpointError) as e: load_unet(f, expect_context=64)
    one_sentence(e, 'T = 8 frames, 64 are wanted')


# --- the VAE

def test_sd_vae_equals_diffusers_with_the_factor_applied_once(sd, tmp_path):
    vae,ref = sd_vae(sd).requires_grad_(False),AutoencoderKL.from_pretrained(sd/'vae').requires_grad_(False); s = ref.config.scaling_factor
    x = normal((3, PAD, 16), 'x', samples=range(3)).clamp(-1, 1); z = vae.encode(x); q = ref.encode(x).latent_dist; eps = normal(z.shape[1:], 'e', samples=range(3))
    assert vae.scale==s and (z-q.mode()*s).abs().max()<1e-5 and (vae.decode(z)-ref.decode(z/s).sample).abs().max()<1e-5
    assert (vae.encode(x, eps)-(q.mean+q.std*eps)*s).abs().max()<1e-4 and abs(float(vae(x, eps)[1])-float(q.kl().mean()/z[0].numel()))<1e-2*abs(float(vae(x, eps)[1]))
    back = load_vae(save_model(vae, tmp_path/'vae')); assert isinstance(back, SDVAE) and torch.equal(back.encode(x), z) and fingerprint(back)==fingerprint(vae)
    assert isinstance(load_vae(sd), SDVAE) and isinstance(load_vae(str(sd/'vae')), SDVAE)
    other = load_vae(sd); other.quant_conv.bias.data[0] += 1; assert fingerprint(other)!=fingerprint(vae) # it is part of the encoder

def test_240_rows_become_256_and_come_back(sd):
    vae = sd_vae(sd); x = np.full((1, 240, 32, 3), 90, np.uint8); z = encode_frames(vae, x, preset('paper').pad_height)
    assert z.shape==(1, 4, 32, 4) and decode_latents(vae, z, 240).shape==x.shape

def test_a_preset_that_names_a_vae_gets_it(sd, tmp_path):
    cfg = preset('tiny', vae=str(sd)); vae = train_vae(cfg, [], tmp_path, progress=False); assert isinstance(vae, SDVAE) and fingerprint(load_vae(tmp_path/'vae'))==fingerprint(vae)
    with pytest.raises(CheckpointError) as e: train_vae(preset('laptop', vae=str(sd)), [], tmp_path)
    one_sentence(e, '12 are wanted')

@pytest.fixture(scope='module')
def rec(tmp_path_factory): return recording(tmp_path_factory.mktemp('rec'), 4, 12)

def test_the_cache_resumes_and_shards(sd, rec, tmp_path):
    vae = sd_vae(sd); assert encode_recording(vae, rec, tmp_path/'a', PAD, progress=False)==4 and encode_recording(vae, rec, tmp_path/'a', PAD, progress=False)==0
    npys(tmp_path/'a')[1].unlink(); assert encode_recording(vae, rec, tmp_path/'a', PAD, progress=False)==1
    assert sum(encode_recording(vae, rec, tmp_path/'b', PAD, shard=i, num_shards=2, progress=False) for i in (0, 1))==4
    assert [p.read_bytes() for p in npys(tmp_path/'a')]==[p.read_bytes() for p in npys(tmp_path/'b')] and LatentData([(rec, tmp_path/'a')]).z.shape==(48, 4, 2, 2)
    encode_recording(vae, rec, tmp_path/'c', PAD, sample=0, progress=False); encode_recording(vae, rec, tmp_path/'d', PAD, batch=5, sample=0, shard=0, num_shards=2, progress=False)
    c,d = np.load(npys(tmp_path/'c')[0]),np.load(npys(tmp_path/'d')[0]); assert np.abs(c-d).max()<1e-2<np.abs(c-np.load(npys(tmp_path/'a')[0])).mean()*10 # draws hang on episode and frame

def test_a_wrong_scale_factor_is_one_sentence(sd, rec, tmp_path):
    vae = sd_vae(sd); encode_recording(vae, rec, tmp_path/'a', PAD, progress=False); s = vae.scale; wrong = sd_vae(sd); wrong.register_to_config(scaling_factor=s/.18215)
    for call,words in ((lambda: encode_recording(wrong, rec, tmp_path/'a', PAD, progress=False), (tmp_path/'a', 'was encoded with scale factor')),
                       (lambda: encode_recording(wrong, rec, tmp_path/'b', PAD, progress=False), ('standard deviation of', 'scale factor'))):
        with pytest.raises(DataError) as e: call()
        one_sentence(e, *words)
    assert not npys(tmp_path/'b') # nothing wrong was written
    with pytest.raises(DataError) as e: encode_recording(vae, rec, tmp_path/'a', PAD, sample=1, progress=False)
    one_sentence(e, 'draw')

def test_a_cache_from_before_the_scale_was_noted_is_taken(sd, rec, tmp_path):
    vae = sd_vae(sd); encode_recording(vae, rec, tmp_path/'a', PAD, progress=False)
    (tmp_path/'a'/'index.json').write_text(json.dumps(dict(encoder=fingerprint(vae), pad_height=PAD))); assert encode_recording(vae, rec, tmp_path/'a', PAD, progress=False)==0


# --- the decoder

def test_tuning_touches_the_decoder_alone(sd, rec, tmp_path):
    vae = sd_vae(sd); before = {k:v.clone() for k,v in vae.state_dict().items()}; cfg = preset('tiny', height=12, width=16, vae=str(sd), vae_batch=4, vae_lr=1e-3); x = np.zeros((2, 12, 16, 3), np.uint8); z = encode_frames(vae, x, PAD)
    a = dict(cfg=cfg, vae=vae, folders=[rec], steps=2, pool=40, progress=False); one = tune_decoder(out=tmp_path/'1', **a, accumulate=1); two = tune_decoder(out=tmp_path/'2', **a, accumulate=4)
    for tuned in (one, two, load_vae(tmp_path/'1'/'decoder')):
        assert {k.split('.')[0] for k,v in tuned.state_dict().items() if not torch.equal(v, before[k])}=={'decoder'}
        assert torch.equal(encode_frames(tuned, x, PAD), z) and fingerprint(tuned)==fingerprint(vae)
    assert all(torch.equal(before[k], v) for k,v in vae.state_dict().items())
    off = max(float((p-q).abs().max()) for p,q in zip(one.decoder.parameters(), two.decoder.parameters())); assert off<1e-3 # four small passes are one large one, but for rounding (AdamW turns it into signs)

def test_tuning_on_generated_latents_uses_them(sd, rec, tmp_path):
    vae = sd_vae(sd); encode_recording(vae, rec, tmp_path/'z', 32, progress=False); data = LatentData([(rec, tmp_path/'z')])
    z,x = generated_pairs(lambda ctx,a,samples: ctx[:,-1]+a[:,-1].sum(-1)[:,None,None,None], [(rec, tmp_path/'z')], 4, n=20, batch=7)
    assert z.shape==(20, 4, 4, 2) and x.shape==(20, 12, 16, 3)
    rows = [np.flatnonzero((np.abs(data.z[:-1].astype(np.float32)+data.rows.actions[:-1].sum(-1)[:,None,None,None]-zi.numpy()).max((1, 2, 3))<1e-3)) for zi in z]
    assert all(len(r) for r in rows)
    from gamengen_nb.dataset import episode_files, read_episode
    frames = np.concatenate([read_episode(f).frames for f in episode_files(rec)]); assert all((frames[r[0]+1]==f).all() for r,f in zip(rows, x)) # the frame that came next
    cfg = preset('tiny', height=12, width=16, vae_batch=4, vae_lr=1e-3); kw = dict(steps=2, pool=40, progress=False, accumulate=1)
    a = tune_decoder(cfg, vae, [rec], tmp_path/'a', **kw); b = tune_decoder(cfg, vae, [rec], tmp_path/'b', generated=(z, x), share=1., **kw)
    assert any(not torch.equal(p, q) for p,q in zip(a.decoder.parameters(), b.decoder.parameters()))

def test_lpips_is_there_or_says_what_to_do(sd, rec, tmp_path):
    try: lpips_distance()
    except ConfigError as e: assert '\n' not in str(e) and 'pip install lpips torchvision' in str(e)
    else: pytest.skip('LPIPS and its weights are here')
    with pytest.raises(ConfigError): tune_decoder(preset('tiny'), sd_vae(sd), [rec], tmp_path, steps=1, lpips=.1)


# --- the pipeline

@pytest.fixture(scope='module')
def model(sd, tmp_path_factory):
    net = surgery(sd); g = torch.Generator().manual_seed(1); net.unet.conv_in.weight[:,4:] = .02*torch.randn(net.unet.conv_in.weight[:,4:].shape, generator=g); torch.nn.init.normal_(net.level_embedding.weight, generator=g)
    return P.random_model(tmp_path_factory.mktemp('model')/'m', CFG, unet=net, vae=sd_vae(sd), guidance=1.5)

def test_a_pipeline_of_sd_parts_plays_bit_equal_after_saving(model, tmp_path):
    pipe = P.Pipeline.from_pretrained(model); again = P.Pipeline.from_pretrained(pipe.save_pretrained(tmp_path/'again', max_shard_size='1MB'))
    assert len(list((tmp_path/'again'/'unet').glob('*.safetensors')))>2 and isinstance(again.vae, SDVAE) and type(pipe).__mro__[1].__name__=='DiffusionPipeline'
    films = []
    for p in (pipe, again):
        env = NeuralDoom(p, backend='eager'); env.reset(seed=0, options=dict(clip=1)); films.append(np.stack([env.step(k)[0] for k in env.action_spec.table()[:3]]))
    assert np.array_equal(*films) and films[0].shape==(3, 60, 80, 3)
    assert sorted(pipe.components)==['scheduler', 'unet', 'vae'] and isinstance(pipe.scheduler, DDIMScheduler) and pipe.scheduler.config.timestep_spacing=='trailing'

def test_guidance_asks_both_questions_in_one_call_and_the_null_is_zero_everywhere(model):
    pipe = P.load_pipeline(model); seen = []; pipe.unet.unet.conv_in.register_forward_pre_hook(lambda m,x: seen.append(x[0].clone()))
    ctx,a = pipe.clips['latents'][:2].float(),pipe.clips['actions'][:2]; pipe(ctx, a, steps=2, noise_level=.3)
    assert len(seen)==2 and all(x.shape==(4, 36, 8, 10) and (x[2:,4:]==0).all() and (x[:2,4:]!=0).all() and torch.equal(x[:2,:4], x[2:,:4]) for x in seen)
    kw = dict(steps=1, noise_level=0.); w1 = pipe(ctx, a, guidance=1., **kw); w0 = pipe(0*ctx, a, guidance=1., **kw); w = pipe(ctx, a, guidance=1.5, **kw); assert (w-(w0+1.5*(w1-w0))).abs().max()<1e-4

def test_the_engine_the_pipeline_and_the_call_agree(model):
    pipe = P.load_pipeline(model); env = NeuralDoom(pipe, backend='eager'); env.reset(seed=3); s = env.get_state(); k = env.action_spec.press('ATTACK')
    a = torch.from_numpy(s['actions']).clone(); a[0,-1] = torch.from_numpy(k); z = pipe(torch.from_numpy(s['latents']), a, key=(s['seed'],), samples=[s['step']]); env.step(k)
    assert np.abs(env.get_state()['latents'][:,-1]-z.numpy()).max()<1e-5

def test_save_refuses_pickles_and_load_names_them(model, tmp_path):
    pipe = P.load_pipeline(model)
    with pytest.raises(ConfigError) as e: pipe.save_pretrained(tmp_path/'x', safe_serialization=False)
    one_sentence(e, 'safetensors only'); assert not list(tmp_path.iterdir())
    f = shutil.copytree(model, tmp_path/'copy'); w = f/'vae'/'diffusion_pytorch_model.safetensors'; w.rename(w.with_suffix('.bin')); P.seal(f)
    with pytest.raises(CheckpointError) as e: P.Pipeline.from_pretrained(f)
    one_sentence(e, 'pickles only')

def test_hub_names(model, tmp_path, monkeypatch):
    asked = []; monkeypatch.setattr(P, 'from_hub', lambda name, patterns, revision: asked.append((name, tuple(patterns), revision)) or model)
    pipe = P.Pipeline.from_pretrained('owner/game', revision='abc'); assert asked==[('owner/game', ('*.json', '*.safetensors', 'README.md'), 'abc')]
    NeuralDoom('owner/game', backend='eager'); done = []
    class Hub:
        def __init__(self, token=None): done.append(token)
        def create_repo(self, repo_id, private, exist_ok): done.append((repo_id, private))
        def upload_folder(self, repo_id, folder_path, commit_message): P.verify(folder_path); assert 'hello' in open(f'{folder_path}/README.md').read(); return 'done'
    monkeypatch.setattr(P, 'HfApi', Hub); assert pipe.push_to_hub('owner/game', private=True, token='t', card='hello')=='done' and done==['t', ('owner/game', True)]

def test_another_vae_in_the_folder_is_refused(model, tmp_path):
    pipe = P.load_pipeline(model); from gamengen_nb.latents import SmallVAE
    with pytest.raises(CheckpointError) as e: P.save_pipeline(tmp_path/'x', pipe.unet, SmallVAE(12, (8, 8, 8)), pipe.meta, pipe.clips)
    one_sentence(e, 'latent channels of the U-Net is 4')
    with pytest.raises(CheckpointError) as e: P.load_pipeline(model, expect_context=64)
    one_sentence(e, 'context T 8, but 64')
