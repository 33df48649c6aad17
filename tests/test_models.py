"VAE, latent cache, denoiser and loss: what is saved is what is loaded, what is damaged is named, what is finished stays."
import json, subprocess, sys, time

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from gamengen_nb.core import CheckpointError, ConfigError, DataError, alpha_bar, normal, preset, rng, seal
from gamengen_nb.dataset import Episode, episode_files, episode_id, join_rows, targets, write_episode
from gamengen_nb.decoder import tune_decoder
from gamengen_nb.diffusion import add_noise, diffusion_loss, make_batch, noise_bucket
from gamengen_nb.latents import FramePool, LatentData, SmallVAE, decode_latents, encode_frames, encode_recording, fingerprint, load_vae, save_model, train_vae
from gamengen_nb.unet import ActionUNet, load_unet, make_unet

PAD,T,C,A = 16,4,4,3
LINE = dict(buttons=['TURN_LEFT', 'TURN_RIGHT', 'ATTACK'], kinds=['binary']*3, scales=[1.]*3, exclusive=[['TURN_LEFT', 'TURN_RIGHT']])


def small_vae(seed=0): torch.manual_seed(seed); return SmallVAE(latent_channels=2, widths=(8, 8, 8), scale=1.5).eval()

def small_unet(**kw):
    torch.manual_seed(0)
    return ActionUNet(context=T, latent_channels=C, action_dim=A, sample_size=(8, 8), widths=(16, 32), cross_dim=16, heads=2, **kw).eval().requires_grad_(False)

def recording(folder, episodes=5, n=20, tics=2, spec=LINE):
    "Episodes of noise, 12×16 px, written as the recorder does; no ViZDoom, so it is fast."
    for i in range(episodes):
        g = rng('toy', i); meta = dict(id=episode_id(0, 0, i), seed=0, stream=0, n=i, scenario='toy', skill=None, frame_tics=tics, action_spec=spec, variable_names=[], source='random')
        write_episode(Episode(g.integers(0, 256, (n, 12, 16, 3)).astype(np.uint8), g.integers(0, 2, (n, A)).astype(np.float32), np.zeros(n, np.float32), np.zeros((n, 0), np.float32), True, False, meta),
            folder/'stream-0000'/f'ep-{i:06d}.parquet')
    return folder

def inputs():
    t = torch.tensor([999, 300])
    return normal((C, 8, 8), 'z', samples=[0, 1]), t, normal((T, C, 8, 8), 'ctx', samples=[0, 1]), torch.eye(A)[torch.tensor([[0, 0, 1, 2], [1, 1, 1, 0]])], torch.tensor([0, 9])

def one_sentence(error, *words):
    s = str(error.value)
    assert '\n' not in s and s.endswith('.') and len(s)<500, s
    for w in words: assert str(w) in s, s

def npys(cache): return sorted(cache.glob('stream-*/*.npy'))


# --- checkpoints

def test_saved_is_loaded_bit_for_bit(tmp_path):
    vae,net = small_vae(),small_unet()
    v,u = load_vae(save_model(vae, tmp_path/'vae')),load_unet(save_model(net, tmp_path/'unet'))
    for a,b in ((vae, v), (net, u)):
        assert a.state_dict().keys()==b.state_dict().keys() and all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values()))
        assert not b.training
    with torch.no_grad(): assert torch.equal(net(*inputs()), u(*inputs()))
    x = rng('frames').integers(0, 256, (2, 12, 16, 3)).astype(np.uint8)
    assert torch.equal(encode_frames(vae, x, PAD), encode_frames(v, x, PAD)) and v.config.scale==1.5

def test_saving_twice_replaces_and_leaves_nothing_behind(tmp_path):
    (tmp_path/'.vae.tmp').mkdir(); (tmp_path/'.vae.tmp'/'rest').write_text('left by a killed run')
    save_model(small_vae(0), tmp_path/'vae'); save_model(small_vae(1), tmp_path/'vae')
    assert [p.name for p in tmp_path.iterdir()]==['vae'] and not (tmp_path/'vae'/'rest').exists()
    assert fingerprint(load_vae(tmp_path/'vae'))==fingerprint(small_vae(1))!=fingerprint(small_vae(0))

def test_half_precision_weights_come_back_as_float32(tmp_path):
    v = load_vae(save_model(small_vae().bfloat16(), tmp_path/'vae'))
    assert v.dtype==torch.float32
    x = np.zeros((1, 12, 16, 3), np.uint8); assert decode_latents(v, encode_frames(v, x, PAD), 12).shape==x.shape
    half = small_vae().bfloat16(); assert encode_frames(half, x, PAD).dtype==torch.float32 # a VAE in bf16 encodes too

def damage(f, how):
    w = f/'diffusion_pytorch_model.safetensors'; b = bytearray(w.read_bytes())
    if how=='missing folder': return f.with_name('nowhere')
    if how=='missing weights': w.unlink()
    if how=='unfinished': (f/'sha256.json').unlink()
    if how=='truncated': w.write_bytes(b[:len(b)//2])
    if how=='flipped bit': b[-5] ^= 4; w.write_bytes(b)
    if how=='truncated config': (f/'config.json').write_text((f/'config.json').read_text()[:40])
    if how=='broken seal': (f/'sha256.json').write_text('{')
    if how=='sealed rubbish': w.write_bytes(b[:len(b)//2]); seal(f)
    if how=='sealed other config': (f/'config.json').write_text(json.dumps(json.loads((f/'config.json').read_text())|dict(widths=[16, 16, 16]))); seal(f)
    if how=='no model': [p.unlink() for p in f.iterdir()]; (f/'a.txt').write_text('a'); seal(f)
    return f

HOWS = ('missing folder', 'missing weights', 'unfinished', 'truncated', 'flipped bit', 'truncated config', 'broken seal', 'sealed rubbish', 'sealed other config', 'no model')

@pytest.mark.parametrize('how', HOWS)
@pytest.mark.parametrize('kind', ['vae', 'unet'])
def test_a_bad_checkpoint_is_one_sentence(tmp_path, how, kind):
    f = damage(save_model(small_vae() if kind=='vae' else small_unet(), tmp_path/kind), how)
    with pytest.raises(CheckpointError) as e: (load_vae if kind=='vae' else load_unet)(f)
    one_sentence(e, f)

def test_the_wrong_kind_of_folder_is_refused(tmp_path):
    v,u = save_model(small_vae(), tmp_path/'vae'),save_model(small_unet(), tmp_path/'unet')
    for load,f,word in ((load_vae, u, 'ActionUNet'), (load_unet, v, 'SmallVAE')):
        with pytest.raises(CheckpointError) as e: load(f)
        one_sentence(e, f, word)
    with pytest.raises(CheckpointError) as e: load_vae(recording(tmp_path/'frames', 1))
    one_sentence(e, 'not a finished checkpoint')

def test_a_vae_inside_a_pipeline_is_sealed_with_it(tmp_path):
    f = tmp_path/'pipe'; f.mkdir(); (f/'model_index.json').write_text('{}'); save_model(small_vae(), f/'vae'); (f/'vae'/'sha256.json').unlink(); seal(f)
    assert fingerprint(load_vae(f/'vae'))==fingerprint(small_vae())
    damage(f/'vae', 'flipped bit')
    with pytest.raises(CheckpointError) as e: load_vae(f/'vae')
    one_sentence(e, 'is damaged')

def test_no_path_of_the_maker_is_saved(tmp_path):
    save_model(load_vae(save_model(small_vae(), tmp_path/'vae')), tmp_path/'again')
    assert str(tmp_path) not in (tmp_path/'again'/'config.json').read_text()

def full_disk(bytes_, call):
    "Run `call` with a limit on the size of every file: what a full disk does, for this process only."
    resource = pytest.importorskip('resource') # not on Windows
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE); resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try: call()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def test_full_disk_while_saving(tmp_path):
    old = save_model(small_vae(0), tmp_path/'vae')
    with pytest.raises(DataError) as e: full_disk(4096, lambda: save_model(small_vae(1), old))
    one_sentence(e, old)
    assert fingerprint(load_vae(old))==fingerprint(small_vae(0)) and [p.name for p in tmp_path.iterdir()]==['vae'] # the old one is whole


# --- the latent cache

def test_encoding_goes_on_after_a_deletion(tmp_path):
    vae,rec,out = small_vae(),recording(tmp_path/'frames'),tmp_path/'latents'
    assert encode_recording(vae, rec, out, PAD, progress=False)==5 and encode_recording(vae, rec, out, PAD, progress=False)==0
    want = {p:p.read_bytes() for p in npys(out)}
    npys(out)[2].unlink(); (npys(out)[0].parent/'.ep-000002.npy.123.tmp').write_bytes(b'half')
    assert encode_recording(vae, rec, out, PAD, progress=False)==1
    assert {p:p.read_bytes() for p in npys(out)}==want and not list(out.rglob('*.tmp'))
    assert sum(encode_recording(vae, rec, tmp_path/'shards', PAD, shard=i, num_shards=3, progress=False) for i in range(3))==5
    assert [p.read_bytes() for p in npys(tmp_path/'shards')]==list(want.values())

SLOW = '''
import sys, time
from gamengen_nb import latents as L
vae = L.load_vae(sys.argv[1]); fast = vae.encode
def encode(x): time.sleep(.3); return fast(x)
vae.encode = encode
L.encode_recording(vae, sys.argv[2], sys.argv[3], 16, progress=False)
'''

@pytest.mark.skipif(sys.platform=='win32', reason='Windows has no SIGKILL')
def test_kill_while_encoding_loses_nothing_finished(tmp_path):
    vae,rec,out = small_vae(),recording(tmp_path/'frames', 8),tmp_path/'latents'
    p = subprocess.Popen([sys.executable, '-c', SLOW, str(save_model(vae, tmp_path/'vae')), str(rec), str(out)], cwd=tmp_path)
    end = time.monotonic()+300
    while len(npys(out))<2 and p.poll() is None and time.monotonic()<end: time.sleep(.01)
    p.kill(); assert p.wait()==-9                            # SIGKILL, in the middle of the recording
    done = {f:f.read_bytes() for f in npys(out)}; assert 2<=len(done)<8
    for f in done: assert len(np.load(f))==20                # every file that is there is whole
    assert encode_recording(vae, rec, out, PAD, progress=False)==8-len(done) # the next run makes the others only,
    assert all(f.read_bytes()==b for f,b in done.items())    # and leaves these as they were
    encode_recording(vae, rec, tmp_path/'again', PAD, progress=False)
    assert [f.read_bytes() for f in npys(out)]==[f.read_bytes() for f in npys(tmp_path/'again')]
    assert len(LatentData([(rec, out)]).z)==160

def test_ctrl_c_while_encoding(tmp_path):
    vae,rec,out = small_vae(),recording(tmp_path/'frames'),tmp_path/'latents'; fast,calls = vae.encode,[]
    def encode(x):
        calls.append(1)
        if len(calls)==3: raise KeyboardInterrupt
        return fast(x)
    vae.encode = encode
    with pytest.raises(KeyboardInterrupt): encode_recording(vae, rec, out, PAD, progress=False)
    assert len(npys(out))==2 and not list(out.rglob('*.tmp'))
    assert encode_recording(vae, rec, out, PAD, progress=False)==3

def test_full_disk_while_encoding(tmp_path):
    vae,rec,out = small_vae(),recording(tmp_path/'frames', 2, 200),tmp_path/'latents' # one episode's latents are 3 kB
    with pytest.raises(DataError) as e: full_disk(1024, lambda: encode_recording(vae, rec, out, PAD, progress=False))
    one_sentence(e, out/'stream-0000'/'ep-000000.npy', 'nothing finished is lost')
    assert not npys(out) and not list(out.rglob('*.tmp'))    # nothing half-written
    assert encode_recording(vae, rec, out, PAD, progress=False)==2 # with space again, it goes on

def test_a_cache_of_another_encoder_is_refused(tmp_path):
    rec,out = recording(tmp_path/'frames', 2),tmp_path/'latents'
    encode_recording(small_vae(0), rec, out, PAD, progress=False)
    with pytest.raises(DataError) as e: encode_recording(small_vae(1), rec, out, PAD, progress=False)
    one_sentence(e, out, 'another VAE')
    encode_recording(small_vae(1), rec, tmp_path/'other', PAD, progress=False)
    with pytest.raises(DataError) as e: LatentData([(rec, out), (rec, tmp_path/'other')])
    one_sentence(e, 'different encoders')

@pytest.fixture(scope='module')
def encoded(tmp_path_factory):
    f = tmp_path_factory.mktemp('encoded'); rec = recording(f/'frames'); encode_recording(small_vae(), rec, f/'latents', PAD, progress=False)
    return rec, f/'latents'

@pytest.mark.parametrize('how', ['missing', 'empty', 'truncated', 'rubbish', 'pickled', 'header', 'too short', 'wrong shape', 'other size'])
def test_a_bad_latent_file_is_named(encoded, how):
    rec,cache = encoded; p = npys(cache)[3]; good = p.read_bytes()
    try:
        if how=='missing': p.unlink()
        if how=='empty': p.write_bytes(b'')
        if how=='truncated': p.write_bytes(good[:-100])
        if how=='rubbish': p.write_bytes(b'x'*1000)
        if how=='pickled': np.save(p, np.array([{}], object), allow_pickle=True)
        if how=='header': b = bytearray(good); b[12] ^= 64; p.write_bytes(b)
        if how=='too short': np.save(p, np.load(p)[:-1])
        if how=='wrong shape': np.save(p, np.zeros(20))
        if how=='other size': np.save(p, np.zeros((20, 2, 4, 4), np.float16))
        with pytest.raises(DataError) as e: LatentData([(rec, cache)])
        one_sentence(e, p)
    finally: p.write_bytes(good)

@pytest.mark.parametrize('change', [dict(spec=LINE|dict(buttons=['TURN_LEFT', 'TURN_RIGHT', 'MOVE_FORWARD'])), dict(tics=4)])
def test_two_games_do_not_mix(encoded, tmp_path, change):
    other = recording(tmp_path/'other', 2, **change); encode_recording(small_vae(), other, tmp_path/'latents', PAD, progress=False)
    with pytest.raises(DataError) as e: LatentData([encoded, (other, tmp_path/'latents')])
    one_sentence(e, 'action spec or clock')
    with pytest.raises(DataError) as e: LatentData([])
    one_sentence(e)

def test_windows_come_from_the_right_rows(encoded):
    d = LatentData([encoded]); ctx,a,z = d.batch(np.array([1, 30, 99]), T)
    assert ctx.shape==(3, T, 2, 2, 2) and (z==d.z[[1, 30, 99]]).all()
    assert (ctx[1]==d.z[26:30]).all() and (a[1]==d.rows.actions[26:30]).all() and (ctx[0]==d.z[0]).all() and not a[0,:-1].any()

def test_windows_are_fast_enough():
    d,g = object.__new__(LatentData),rng('speed')            # the laptop's shape, without files
    d.z = g.standard_normal((4000, 12, 16, 20), np.float32).astype(np.float16)
    d.rows = join_rows([(dict(seed=0, stream=0, n=0, id='0'*16, terminated=False), np.zeros((4000, 3), np.float32))]); pick = targets(d.rows); best = 0
    for _ in range(5):
        rows = [g.choice(pick, 64) for _ in range(20)]; c = time.process_time()
        for r in rows: d.batch(r, 6)
        best = max(best, 64*20/(time.process_time()-c))
    assert best>=20_000, f'{best:.0f} windows per second of processor time'

def test_frame_pools_want_one_size(tmp_path):
    a = recording(tmp_path/'a', 1); b = recording(tmp_path/'b', 1)
    ep = Episode(np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, A), np.float32), np.zeros(4, np.float32), np.zeros((4, 0), np.float32), True, False, dict(seed=0, stream=0, n=0, id='1'*16, frame_tics=2, action_spec=LINE, variable_names=[], source='random'))
    write_episode(ep, b/'stream-0000'/'ep-000000.parquet')
    with pytest.raises(DataError) as e: FramePool([a, b], 100)
    one_sentence(e, 'one size')


# --- VAE and decoder

def test_training_gives_unit_latents_and_tuning_leaves_them(tmp_path):
    cfg = preset('tiny', height=12, width=16, latent_channels=2, vae_widths=(8, 8, 8), vae_batch=2); rec = recording(tmp_path/'frames', 2)
    vae = train_vae(cfg, [rec], tmp_path, steps=3, pool=40, progress=False); x = FramePool([rec], 40).frames
    z = encode_frames(vae, x, cfg.pad_height); assert abs(float(z.std())-1)<.05
    before = {k:v.clone() for k,v in vae.state_dict().items()}
    tuned = tune_decoder(cfg, vae, [rec], tmp_path, steps=3, pool=40, progress=False); after = tuned.state_dict()
    assert all(torch.equal(before[k], v) for k,v in vae.state_dict().items())                       # the VAE that was given
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith('encoder'))         # the encoder
    assert not all(torch.equal(before[k], after[k]) for k in before if k.startswith('decoder'))     # the decoder did learn
    assert torch.equal(z, encode_frames(load_vae(tmp_path/'decoder'), x, cfg.pad_height)) and fingerprint(tuned)==fingerprint(vae)


# --- denoiser and loss

def test_v_and_noise_equal_diffusers():
    ref = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', prediction_type='v_prediction')
    t = torch.arange(0, 1000, 37); z,e = normal((4, 8, 8), 'z', samples=t),normal((4, 8, 8), 'e', samples=t)
    zt,v = add_noise(z, e, alpha_bar()[t])
    assert torch.allclose(zt, ref.add_noise(z, e, t), atol=1e-5, rtol=0) and torch.allclose(v, ref.get_velocity(z, e, t), atol=1e-5, rtol=0)

@pytest.mark.parametrize('net', [small_unet, lambda: make_unet(preset('tiny'), A).requires_grad_(False)], ids=['plain', 'preset'])
def test_a_dropped_past_is_exactly_zero_at_the_networks_input(net):
    net,seen,tok = net(),[],[]; net.unet.conv_in.register_forward_hook(lambda m,x,y: seen.append(x[0].clone()))
    net.action_embedding.register_forward_hook(lambda m,x,y: tok.append(x[0].clone()))
    z,t,ctx,a,_ = inputs(); e = normal(z.shape[1:], 'e', samples=[0, 1]); ce = normal(ctx.shape[1:], 'ce', samples=[0, 1]); level = torch.tensor([.7, .7])
    diffusion_loss(net, z, ctx, a, e, ce, t, level, torch.tensor([1., 0.]))
    x = seen[-1]
    assert (x[1,C:]==0).all() and not (x[0,C:]==0).any()     # the null: zero latents, after the noise
    assert torch.allclose(x[0,C:].view(T, C, 8, 8), ctx[0]+.7*ce[0]) and torch.equal(tok[-1], a) # a kept past, and the actions of both, stay

def test_the_noised_latent_comes_first():
    net,seen = small_unet(),[]; net.unet.conv_in.register_forward_hook(lambda m,x,y: seen.append(x[0].clone()))
    z,t,ctx,a,lv = inputs(); net(z, t, ctx, a, lv)
    assert torch.equal(seen[-1][:,:C], z) and torch.equal(seen[-1][:,C:2*C], ctx[:,0]) and torch.equal(seen[-1][:,-C:], ctx[:,-1])

def test_the_order_of_actions_counts():
    z,t,ctx,a,lv = inputs(); b = a.clone(); b[0,2:] = a[0,2:].flip(0)
    for flag in (True, False):
        net = small_unet(action_in_time=flag); d = (net(z, t, ctx, a, lv)-net(z, t, ctx, b, lv)).abs().amax((1, 2, 3))
        assert d[0]>1e-5 and d[1]==0, (flag, d)              # only the sample whose actions were swapped
    net.position.zero_(); assert (net(z, t, ctx, a, lv)-net(z, t, ctx, b, lv)).abs().max()<1e-5 # without positions: a bag

def test_buckets():
    assert noise_bucket(torch.tensor([0., .06, .08, .7])).tolist()==[0, 0, 1, 9]
    for bad in (-.1, .8, float('nan'), float('inf')):
        with pytest.raises(ConfigError) as e: noise_bucket(torch.tensor([bad]))
        one_sentence(e, '0…0.7')

def test_a_sample_hangs_on_its_number_alone(encoded):
    d = LatentData([encoded]); cfg = preset('tiny'); pick = targets(d.rows)
    whole = make_batch(d, pick, cfg, 8, 0, range(8, 16)); halves = [make_batch(d, pick, cfg, 8, 0, s) for s in (range(8, 12), range(12, 16))]
    assert all(torch.equal(whole[k], torch.cat([h[k] for h in halves])) for k in whole)

def test_the_papers_network_has_stable_diffusions_shape():
    with torch.device('meta'): ours,sd = make_unet(preset('paper'), A).unet.state_dict(),UNet2DConditionModel(cross_attention_dim=768).state_dict()
    assert ours.keys()==sd.keys() and [k for k in sd if ours[k].shape!=sd[k].shape]==['conv_in.weight'] and ours['conv_in.weight'].shape[1]==260
