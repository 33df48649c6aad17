"""What a run costs: the planner's formulas against torch's own counts, the benchmarks, launch files, and (GAMENGEN_SLOW=1) 64 windows learned by heart."""
import json, os, subprocess

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gamengen_nb import cli
from gamengen_nb.core import ConfigError, normal, preset, repo_data, rng
from gamengen_nb.scale import bench_infer, bench_train, layer_costs, make_vae, matmul_rate, network_costs, plan, show_plan, unet_inputs
from gamengen_nb.training import fit, make_optimizer, save_memory
from gamengen_nb.unet import make_unet

torch.set_num_threads(1)

def network(cfg, device, batch=1):
    with torch.device(device): net = make_unet(cfg, 3)
    b = unet_inputs(cfg, batch, device=device); return net, lambda: net(b['z0'], b['t'], b['ctx'], b['actions'], b['t']%10)
def counted(call):
    with FlopCounterMode(display=False) as f: out = call()
    return f.get_total_flops(), out

# ---- the planner
@pytest.mark.parametrize('name', ['tiny', 'laptop', 'paper'])
def test_flops_are_torchs_and_an_update_is_three_passes(name):
    net,call = network(preset(name), 'meta'); forward,_ = counted(call); assert network_costs(preset(name))['unet_flops']==forward
    both,_ = counted(lambda: call().sum().backward()); assert 2.8<both/forward<=3

@pytest.mark.parametrize('name', ['tiny', 'gpu', 'paper'])
def test_the_autoencoders_flops_are_torchs(name):
    cfg = preset(name)
    with torch.device('meta'): vae = make_vae(cfg); z,x = torch.zeros(1, cfg.latent_channels, *cfg.latent_hw),torch.zeros(1, 3, cfg.pad_height, cfg.width)
    c = network_costs(cfg); assert (c['decode_flops'], c['encode_flops'])==(counted(lambda: vae.decode(z))[0], counted(lambda: vae.encode(x))[0])

def test_parameters_are_exact():
    for name in ('tiny', 'laptop'): assert network_costs(preset(name))['parameters']==sum(p.numel() for p in make_unet(preset(name), 3).parameters())
    c = network_costs(preset('paper')); sd = 859_520_964 # Stable Diffusion 1.4's U-Net
    assert c['parameters']-sd==4*64*320*9+3*768+64*768+10*1280, 'more input channels, action embedding, positions, noise levels; nothing else' 
    assert c['vae_parameters']==83_653_863

def test_memory_is_within_a_quarter_of_what_autograd_keeps():
    cfg = preset('tiny'); c = layer_costs(*network(cfg, 'meta'), half=4)
    for checkpointing,key,factor in ((False, 'kept', 1.25), (True, 'kept_blocks', 1.6)):
        net,call = network(cfg, 'cpu'); own = {p.untyped_storage().data_ptr() for p in net.parameters()}; seen = {}
        if checkpointing: save_memory(net)
        def pack(t): seen[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t); return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): net.train(); out = call()
        assert 1/factor<c[key]/sum(n for k,(n,_) in seen.items() if k not in own)<factor

@pytest.mark.parametrize('optimizer', ['adamw', 'adafactor'])
def test_the_optimisers_memory_is_exact(optimizer):
    cfg = preset('tiny', optimizer=optimizer); net = make_unet(cfg, 3); o = make_optimizer(net, optimizer)
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    o.step(); assert network_costs(cfg)['optimizer_numbers']==sum(v.numel() for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.ndim)

def test_bytes_of_a_recording_and_its_latents():
    from gamengen_nb.dataset import episode_files, read_meta
    files = episode_files(repo_data()/'episodes'); n = sum(read_meta(f)['frames'] for f in files); p = plan(preset('laptop'), frames=n)['disk']
    assert 1/1.3<p['frames']/sum(f.stat().st_size for f in files)<1.3 and p['latents']==n*np.zeros((12, 16, 20), np.float16).nbytes

def test_a_checkpoint_is_as_large_as_planned(tmp_path):
    cfg = preset('tiny'); b = unet_inputs(cfg, 2); from gamengen_nb.diffusion import diffusion_loss
    fit(make_unet(cfg, 3), lambda step,samples: b, diffusion_loss, tmp_path, steps=2, batch=2, save_minutes=0, precision='no', progress=False)
    assert 1<sum(f.stat().st_size for f in tmp_path.glob('step-*/*'))/plan(cfg)['disk']['checkpoints']<1.05 # names and shapes beside the numbers

def test_hours_scale_as_they_must():
    p = plan(preset('paper')); h = p['hours']
    assert plan(preset('paper'), count=16)['hours']['train']==pytest.approx(h['train']/2) and plan(preset('paper'), mfu=.7)['hours']['all']==pytest.approx(h['all']/2)
    assert h['train']==pytest.approx(3*p['flops']['call']*128*700_000/(8*989e12*.35)/3600) and plan(preset('paper'), frames=7e6)['hours']['encode']==pytest.approx(h['encode']/10)
    assert p['price'] is None and plan(preset('paper'), price=3.)['price']==pytest.approx(3*8*h['all']) and 'price' not in show_plan(p)
    assert p['flops']['frame']==8*p['flops']['call']+p['flops']['decode'], 'four steps, each with and without the past'
    small = plan(preset('paper'), 'l4', 1, memory=13.8); assert small['memory']['checkpointing'] and small['memory']['fits'] and small['hours']['train']==pytest.approx(4/3*plan(preset('paper'), 'l4', 1)['hours']['train'])

@pytest.mark.parametrize('kw,match', [(dict(gpu='abacus'), 'no GPU .abacus. in the table; choose one of b200'), (dict(count=7), '128 does not divide over 7 devices'), (dict(count=0), 'must be positive'), (dict(mfu=1.2), 'within 0…1'), (dict(frames=-1), 'must be positive')])
def test_bad_plans_are_one_sentence(kw, match):
    with pytest.raises(ConfigError, match=match): plan(preset('paper'), **kw)

def test_plan_and_bench_are_commands(capsys):
    assert cli.main('plan paper --gpu a100 --count 4 --price 1.5 --mfu .3'.split())==0; said = capsys.readouterr().out
    for word in ('860 M', '4 × a100', 'GPU-hours, price', 'MFU 0.3', 'vendor', '128 TPU-v5e', 'recording'): assert word in said, word
    assert cli.main('plan paper --json --tflops 700 --memory 100'.split())==0; assert json.loads(capsys.readouterr().out)['peak']==7e14
    assert cli.main('plan paper --gpu abacus'.split())==2 and 'choose one of' in capsys.readouterr().err
    for what in ('train', 'infer'):
        assert cli.main(f'bench {what} --preset tiny --device cpu --seconds .2 --precision no'.split())==0; r = json.loads(capsys.readouterr().out)
        assert r['what']==dict(train='update', infer='frame')[what] and r['images_per_s']>0 and 0<r['share_of_matmul']<2 and r['peak_memory_bytes']>1e7
    assert cli.parser().parse_args(['bench']).what=='engine'

def test_the_benchmarks_count_what_they_time():
    cfg = preset('tiny'); c = network_costs(cfg)
    for r,flops in ((bench_train(cfg, 'cpu', batch=2, seconds=.2, precision='no', channels_last=False, checkpointing=True), 3*2*c['unet_flops']), (bench_infer(preset('tiny', guidance=1.5, sample_steps=2), 'cpu', seconds=.2), 4*c['unet_flops']+c['decode_flops'])):
        assert r['flops_per_s']*r['ms']/1e3==pytest.approx(flops) and r['calls']>=3 and r['device']=='CPU'
    assert matmul_rate('cpu', torch.float32, 128, .05)>1e7

def test_launch_files_say_what_they_do(root):
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file
    ddp,fsdp = (load_config_from_file(str(root/'configs'/f'{n}.yaml')) for n in ('ddp', 'fsdp'))
    assert (str(ddp.distributed_type.value), str(fsdp.distributed_type.value), fsdp.fsdp_config['fsdp_version'])==('MULTI_GPU', 'FSDP', 2)
    from diffusers.models import attention, resnet
    for name in fsdp.fsdp_config['fsdp_transformer_layer_cls_to_wrap'].split(','): assert hasattr(attention, name) or hasattr(resnet, name)
    assert 'ritten, not run' in (root/'configs'/'fsdp.yaml').read_text() and subprocess.run(['bash', '-n', root/'configs'/'train.sbatch']).returncode==0

# ---- 64 windows of real Doom by heart: minutes, so only on request
def pairs(cfg, n):
    "`n` pairs of windows with the same past that differ in the newest action: the real game, played twice with the same seed and keys."
    from gamengen_nb.env import DoomEnv
    env = DoomEnv(cfg.scenario, cfg.height, cfg.width, cfg.frame_tics); keys,out,k = env.action_spec.table(),[],0; turn = [env.action_spec.press(b) for b in ('TURN_LEFT', 'TURN_RIGHT')]
    while len(out)<2*n:
        k += 1; r = rng('pair', k); past = [keys[int(x)] for x in r.integers(len(keys), size=8+int(r.integers(4))) for _ in range(3)]; way = turn if r.random()<.5 else turn[::-1]; two = []
        for last in way:
            obs,_ = env.reset(seed=k); frames,acts,over = [obs],[],False
            for a in [*past, *[way[0]]*4, last]:
                obs,_,end,cut,_ = env.step(a); frames.append(obs); acts.append(a); over = over or end or cut
                if over: break
            two.append((np.stack(frames[-cfg.context-1:]), np.stack(acts[-cfg.context:])))
        if not over: assert np.array_equal(two[0][0][:-1], two[1][0][:-1]); out += two
    env.close(); return out

@pytest.mark.skipif(not os.getenv('GAMENGEN_SLOW'), reason='takes minutes; GAMENGEN_SLOW=1 runs it')
def test_64_windows_by_heart(tmp_path):
    from gamengen_nb.diffusion import diffusion_loss, pick_t
    from gamengen_nb.latents import encode_frames, load_vae
    from gamengen_nb.sampler import ddim
    cfg = preset('tiny', scenario='my_way_home', latent_channels=12, unet_widths=(48, 96), unroll=1, noise_max=.3, drop_p=0., batch=16, lr=3e-3, unet_steps=600); ps = pairs(cfg, 32); vae = load_vae(repo_data()/'doom-line'/'vae').float(); f = lambda x: torch.tensor(np.stack(x)).float()
    z = torch.stack([encode_frames(vae, x, cfg.pad_height) for x,_ in ps]); acts = f([a for _,a in ps]); ctx,z0 = z[:,:-1],z[:,-1]
    show = lambda z: torch.cat([vae.decode(z[i:i+8]) for i in range(0, 64, 8)])[:,:,:cfg.height].clamp(-1, 1); psnr = lambda x,y: -10*torch.log10((x-y).square().flatten(1).mean(1)/4)
    def learn(actions, name):
        torch.manual_seed(0); net = make_unet(cfg, acts.shape[-1])
        def batch(step, samples):
            i = [int(rng('window', s//64).permutation(64)[s%64]) for s in samples]; u = [rng('u', s) for s in samples]
            return dict(z0=z0[i], ctx=ctx[i], actions=actions[i], eps=normal(z0.shape[1:], 'eps', samples=samples), ctx_eps=normal(ctx.shape[1:], 'ctx', samples=samples), keep=torch.ones(len(i)),
                t=torch.tensor([pick_t(r.random(), r.random()<cfg.t_focus, cfg.sample_steps) for r in u]), level=f([r.random()**2*cfg.noise_max for r in u]))
        stat = fit(net, batch, lambda m,**b: diffusion_loss(m, **b, top=cfg.noise_max), tmp_path/name, steps=cfg.unet_steps, batch=cfg.batch, lr=cfg.lr, ema=.99, warmup=20, decay=.5, progress=False, save_minutes=100)
        call = lambda z,t: torch.cat([net(z[i:i+16], torch.full((16,), t), ctx[i:i+16], actions[i:i+16], torch.zeros(16, dtype=torch.long)) for i in range(0, 64, 16)])
        with torch.no_grad(): return show(ddim(call, normal(z0.shape[1:], 'start', samples=[i//2 for i in range(64)]), cfg.sample_steps)), stat # one start for both of a pair
    with torch.no_grad(): goal,last = show(z0),show(ctx[:,-1])
    other = goal[torch.arange(64)^1]
    for name,a in (('with actions', acts), ('actions taken away', torch.zeros_like(acts))):
        x,stat = learn(a, name); own = psnr(x, goal); gain = float(own.mean()-psnr(last, goal).mean()); right = float((own>psnr(x, other)).float().mean())
        print(f"{name}: {stat['step']} updates of {cfg.batch}, {stat['seconds']:.0f} s: {own.mean():.1f} dB (worst {own.min():.1f}), {gain:+.1f} over copy-last ({psnr(last, goal).mean():.1f}), nearer to its own target than to its twin's: {right:.0%}")
        if name=='with actions': assert own.mean()>=30 and gain>=8 and right>=.95
        else: assert torch.equal(x[::2], x[1::2]) and right==.5, 'without actions a pair is one and the same'
