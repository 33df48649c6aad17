"Reward and agent: what is executed is what is recorded and learned from; files are safe."
import json
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from gamengen_nb.agent import AgentConfig, AgentPolicy, Hold, load_agent, make_policy, paper_agent, save_agent, train_agent
from gamengen_nb.core import ActionSpec, CheckpointError, ConfigError, rng
from gamengen_nb.dataset import play_episode
from gamengen_nb.env import DoomEnv
from gamengen_nb.reward import PICKUPS, PaperReward, Reward, RewardWeights, Visited, terms

TINY = AgentConfig(past=4, conv=(4, 4, 4), features=8, hidden=8, envs=1, rollout=16, batch=16, epochs=1)
LINE = ActionSpec(('TURN_LEFT', 'TURN_RIGHT', 'ATTACK'), exclusive=(('TURN_LEFT', 'TURN_RIGHT'),))
ZERO = {k:0. for k in (*PICKUPS, 'HITS_TAKEN', 'DEAD', 'HITCOUNT', 'KILLCOUNT', 'SECRETCOUNT', 'POSITION_X', 'POSITION_Y')}


class Toy(gymnasium.Env):
    "A game of noise pictures that writes down what it executes; no ViZDoom, so it is fast."
    def __init__(self, frames=40):
        self.action_spec,self.frame_tics,self.frames = LINE,2,frames
        self.observation_space = gymnasium.spaces.Box(0, 255, (120, 160, 3), np.uint8)
        self.action_space = gymnasium.spaces.MultiBinary(3)
    def look(self): return rng('toy', self.t).integers(0, 256, (120, 160, 3)).astype(np.uint8)
    def reset(self, *, seed=None, options=None): super().reset(seed=seed); self.t,self.done = 0,[]; return self.look(), {}
    def step(self, a): self.t += 1; self.done.append(np.asarray(a)); return self.look(), 1., self.t>=self.frames, False, {}


@pytest.fixture(scope='module')
def agent(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('agent')
    return save_agent(folder, make_policy(TINY, 6).eval(), TINY, LINE, 2, scenario='toy')


@pytest.mark.parametrize('change, term, points', [
    (dict(HITS_TAKEN=1), 'hit_taken', -100), (dict(DEAD=1), 'death', -5000), (dict(HITCOUNT=2), 'enemy_hit', 600),
    (dict(KILLCOUNT=1), 'enemy_kill', 1000), (dict(WEAPON3=1), 'pickup', 100), (dict(SECRETCOUNT=1), 'secret', 500),
    (dict(POSITION_X=128, POSITION_Y=-256), 'new_area', 20*(1+.5*3)), (dict(HEALTH=-7), 'health', -70),
    (dict(ARMOR=5), 'armor', 50), (dict(AMMO2=10, AMMO4=10), 'ammo', 100), (dict(AMMO2=-1, AMMO4=-1), 'ammo', -1)])
def test_ten_terms(change, term, points):
    before = dict(ZERO, HEALTH=100., AMMO2=50., AMMO4=50.); after = {k:v+change.get(k, 0) for k,v in before.items()}
    assert terms(before, after, Visited((0., 0.), {(0, 0)}))[term]==points


def test_baseline_and_ledger():
    r = Reward(); r.reset(ZERO | dict(HITCOUNT=9., KILLCOUNT=4.)) # left over from another episode
    assert sum(r.step(ZERO | dict(HITCOUNT=9., KILLCOUNT=5.)).values())==1000
    assert sum(r.step(ZERO | dict(HITCOUNT=9., KILLCOUNT=5.)).values())==0
    assert r.total['enemy_kill']==1000


def test_reward_refuses_a_neural_engine():
    with pytest.raises(ConfigError, match='neural engine'): PaperReward(Toy()).reset()


def test_paper_numbers():
    c,w = paper_agent(),RewardWeights()
    assert (c.envs, c.rollout, c.batch, c.epochs, c.lr, c.gamma, c.entropy, c.features, c.past) == (8, 512, 64, 10, 1e-4, .99, .1, 512, 32)
    assert (w.hit_taken, w.death, w.enemy_hit, w.enemy_kill, w.pickup, w.secret, w.new_area) == (-100, -5000, 300, 1000, 100, 500, 20)


def test_recorded_is_executed(agent):
    env = Toy(); ep = play_episode(env, AgentPolicy(agent), seed=1, stream=0, n=0)
    assert np.array_equal(ep.actions, np.stack(env.done))
    assert np.array_equal(ep.actions[0::2], ep.actions[1::2]) # 4 tics = 2 frames
    again = play_episode(Toy(), AgentPolicy(agent), seed=1, stream=0, n=0)
    assert np.array_equal(ep.actions, again.actions)
    assert ep.meta['source']=='agent'


def test_recorder_and_trainer_see_the_same(agent):
    policy = AgentPolicy(agent); game,env = Hold(Toy(), TINY),Toy()
    o,_ = game.reset(seed=0); obs,info = env.reset(seed=0); policy.reset(0)
    for t in range(20):
        if t%2==0:
            sees = policy.sight(obs, info)
            assert all(np.array_equal(o[k], sees[k]) for k in o)
        a = policy(obs, info)
        if t%2==0: o,r,*_ = game.step(policy.k); assert r==2. # rewards of both held frames
        obs,_,_,_,info = env.step(a)
    assert np.array_equal(np.stack(game.env.done), np.stack(env.done))


def test_boost_is_in_the_distribution():
    torch.manual_seed(0); p = make_policy(replace(TINY, repeat_boost=2.), 6).eval()
    o = dict(frame=torch.randint(0, 256, (64, 3, 60, 80), dtype=torch.uint8), past=torch.full((64, 4), -1))
    o['past'][32:,-1] = 3
    with torch.no_grad():
        a,_,logp = p(o); _,again,_ = p.evaluate_actions(o, a)
        assert torch.allclose(logp, again, atol=1e-6)
        with_,p.boost = p.get_distribution(o).distribution.logits,0.
        gain = with_-p.get_distribution(o).distribution.logits
    assert torch.allclose(gain[:32], torch.zeros(32, 6), atol=1e-6)  # no decision yet: no boost
    odds = gain[32:]-gain[32:,:1]
    assert torch.allclose(odds[:,3], torch.full((32,), 2.), atol=1e-5)
    assert torch.allclose(odds[:,[1, 2, 4, 5]], torch.zeros(32, 4), atol=1e-5)


def test_loaded_agent_acts_the_same(agent, tmp_path):
    policy,meta = load_agent(agent)
    save_agent(tmp_path, policy, meta['config'], meta['action_spec'], 2)
    play = lambda a: play_episode(Toy(), AgentPolicy(a), seed=5, stream=0, n=0).actions
    assert np.array_equal(play(agent), play(tmp_path))
    assert (tmp_path/'agent.safetensors').read_bytes()==(agent/'agent.safetensors').read_bytes()


@pytest.mark.parametrize('hurt', ['flip', 'truncate', 'remove', 'json', 'format', 'folder'])
def test_corrupt_agent(agent, tmp_path, hurt):
    for p in agent.iterdir(): (tmp_path/p.name).write_bytes(p.read_bytes())
    f = tmp_path/'agent.safetensors'; b = bytearray(f.read_bytes())
    if hurt=='flip': b[len(b)//2] ^= 4; f.write_bytes(b)
    if hurt=='truncate': f.write_bytes(b[:100])
    if hurt=='remove': f.unlink()
    if hurt=='json': (tmp_path/'agent.json').write_text('{')
    if hurt=='format': # a well-sealed agent of some other version
        from gamengen_nb.core import seal
        m = json.loads((tmp_path/'agent.json').read_text()); m['format'] = 'other'; (tmp_path/'agent.json').write_text(json.dumps(m)); seal(tmp_path)
    with pytest.raises(CheckpointError) as e: load_agent(tmp_path/'gone' if hurt=='folder' else tmp_path)
    assert '\n' not in str(e.value) and len(str(e.value))<500


def test_agent_of_another_game(agent):
    env = Toy(); env.frame_tics = 4
    with pytest.raises(CheckpointError, match='tics per frame'): AgentPolicy(agent).check(env)
    env = Toy(); env.action_spec = ActionSpec(('ATTACK', 'USE', 'MOVE_LEFT'))
    with pytest.raises(CheckpointError, match='buttons'): AgentPolicy(agent).check(env)


def test_train_resumes_on_the_real_game(tmp_path):
    kw = dict(height=60, width=80, max_tics=100, progress=False)
    train_agent('defend_the_line', 32, 0, tmp_path, TINY, **kw)
    train_agent('defend_the_line', 48, 0, tmp_path, TINY, **kw)
    assert load_agent(tmp_path)[1]['steps']==48
    with pytest.raises(CheckpointError, match='other settings'): train_agent('defend_the_line', 64, 0, tmp_path, replace(TINY, lr=1.), **kw)
    (tmp_path/'resume.pt').write_bytes((tmp_path/'resume.pt').read_bytes()[:200])
    with pytest.raises(CheckpointError, match='damaged'): train_agent('defend_the_line', 64, 0, tmp_path, TINY, **kw)


def test_ctrl_c_keeps_what_was_learned(tmp_path):
    class Bomb(gymnasium.Wrapper):
        n = 0
        def step(self, a):
            self.n += 1
            if self.n==50: raise KeyboardInterrupt
            return self.env.step(a)
    with pytest.raises(KeyboardInterrupt):
        train_agent('defend_the_line', 64, 0, tmp_path, TINY, wrap=lambda env,i: Bomb(env), height=60, width=80, progress=False)
    assert 16<=load_agent(tmp_path)[1]['steps']<=25


def test_shipped_agent():
    folder = Path(__file__).parent.parent/'data'/'agent-line'
    if not folder.exists(): pytest.skip('no shipped agent in this checkout')
    policy = AgentPolicy(folder)
    assert policy.meta['action_spec'].buttons==('TURN_LEFT', 'TURN_RIGHT', 'ATTACK') and not policy.cfg.automap
    assert (folder/'agent.safetensors').stat().st_size<2**20
    env = Toy(); play_episode(env, policy, 0, 0, 0); assert len(env.done)==40 # frame-only: plays in anything with a picture
