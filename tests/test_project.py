"""The rules of the project itself: who may import whom, how functions are documented, how a notebook is built, what no file may hold."""
import ast, io, json, re, subprocess, sys, tokenize
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from run_all import files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'gamengen_nb'

# module -> (its notebook, the modules it may import). In the order of the course: a module imports only what stands before it.
TABLE = dict(
    core=('00_core', ''), plot=('00a_plot', 'core'), training=('00b_training', 'core'),
    env=('01_environment', 'core'), reward=('02_reward_design', 'core'), agent=('03_ppo_collection', 'core env reward'), dataset=('03a_dataset', 'core'),
    latents=('04_latent_encoding', 'core training dataset'), unet=('05_action_unet', 'core'),
    diffusion=('06_noise_augmentation', 'core training dataset latents unet'), # dataset: only it knows how a window is cut
    decoder=('07_decoder_tuning', 'core training latents'), sampler=('08_ddim_inference', 'core'),
    engine=('08a_engine', 'core latents unet diffusion sampler'),
    metrics=('09_evaluation', 'core training dataset plot'), probes=('09a_probes', 'core training dataset plot metrics'),
    player=('10_player', 'core'), cli=('90_cli', '*'),
)
LINES = 250 # code lines of a module, without blank lines and the cell marks that nbdev writes
LONGER = dict(core=280, agent=300, player=360, cli=300) # one idea that is longer: the vocabulary; PPO with holds and repeats; the player; all commands
COURSE = [m for m in TABLE if m!='cli'] # notebooks with recap, exercises and differences
MODULES = sorted(p.stem for p in PACKAGE.glob('*.py') if not p.stem.startswith('_'))
NOTEBOOKS = sorted(p.stem for p in (ROOT/'nbs').glob('*.ipynb'))

def tree_of(module): return ast.parse((PACKAGE/f'{module}.py').read_text(encoding='utf-8'))

def imports_of(module):
    "Modules of this package that `module` imports, at its top or inside a function."
    found = set()
    for n in ast.walk(tree_of(module)):
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = '.'.join(x for x in ('gamengen_nb' if n.level else '', n.module or '') if x)
            names = [base] if base!='gamengen_nb' else [f'gamengen_nb.{a.name}' for a in n.names]
            if any(a.name=='*' for a in n.names) and base.startswith('gamengen_nb'): found.add('*')
        else: continue
        found |= {x.split('.')[1] for x in names if x.startswith('gamengen_nb.')}
    return found

# ---- modules
def test_every_module_has_a_row_and_every_row_a_module_and_a_notebook():
    assert MODULES==sorted(TABLE), 'a new module needs a row in TABLE: its notebook and what it may import'
    assert NOTEBOOKS==sorted(nb for nb,_ in TABLE.values())

@pytest.mark.parametrize('module', TABLE)
def test_imports_follow_the_table(module):
    used = imports_of(module); before = list(TABLE)[:list(TABLE).index(module)]
    assert '*' not in used, 'exported cells name what they import'
    allowed = before if TABLE[module][1]=='*' else TABLE[module][1].split()
    assert set(allowed)<=set(before), 'the table itself must have no cycle'
    assert used<=set(allowed), f'{module} imports {sorted(used-set(allowed))}'

def test_the_package_itself_imports_nothing(): assert not imports_of('__init__')

@pytest.mark.parametrize('module', TABLE)
def test_a_module_is_short(module):
    n = sum(1 for l in (PACKAGE/f'{module}.py').read_text(encoding='utf-8').splitlines() if l.strip() and not l.startswith('# %%'))
    assert n<=LONGER.get(module, LINES), f'{module} has {n} lines of code'

def test_training_needs_neither_jupyter_nor_the_game():
    path = 'core dataset latents unet diffusion training decoder sampler'
    foreign = 'ipywidgets anywidget IPython ipykernel jupyterlab vizdoom gymnasium stable_baselines3 pygame matplotlib openvino nbdev'
    code = f"import sys\nfor m in '{path}'.split(): __import__('gamengen_nb.'+m)\nprint(*{{m.split('.')[0] for m in sys.modules}} & set('{foreign}'.split()))"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    assert r.stdout.strip()=='', f'training imports {r.stdout}'

@pytest.mark.parametrize('module', TABLE)
def test_python_3_10_can_read_it(module): ast.parse((PACKAGE/f'{module}.py').read_text(encoding='utf-8'), feature_version=(3, 10))

# ---- documentation
CONTRACT = {'reset', 'step', 'close', 'render', 'forward', 'extract_features', 'get_distribution'} # Gymnasium's, torch's, SB3's own words say it
WORDS = set('z x a eps v abar T cfg path folder model'.split()) # mean the same everywhere: the course's letters, a Preset, a file, a folder, a network

def undocumented(src):
    "What an export lacks: a docstring, or a parameter's comment (on its line, which parameters may share), default or mention in the docstring."
    tree = ast.parse(src); comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type==tokenize.COMMENT}
    exported = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '')=='__all__'), [])
    for n in tree.body:
        if getattr(n, 'name', None) not in exported: continue
        doc = ast.get_docstring(n) or ''
        if not doc: yield f'{n.name} has no docstring'
        if isinstance(n, ast.ClassDef):
            for m in n.body:
                if isinstance(m, ast.FunctionDef) and not m.name.startswith('_') and m.name not in CONTRACT and not ast.get_docstring(m):
                    yield f'{n.name}.{m.name} has no docstring'
        if isinstance(n, ast.FunctionDef):
            a = n.args; pos = a.posonlyargs+a.args
            given = {x.arg for x in pos[len(pos)-len(a.defaults):]} | {x.arg for x,d in zip(a.kwonlyargs, a.kw_defaults) if d is not None}
            for x in pos+a.kwonlyargs:
                if x.arg not in given|WORDS and x.lineno not in comments and not re.search(rf'\b{x.arg}\b', doc): yield f'{n.name}: parameter {x.arg} is not explained'

def test_undocumented_sees_what_is_missing():
    src = "__all__ = ['f', 'C']\ndef f(\n  n, b, # two\n  c, # one\n  d=1,\n  *, e, g=2):\n  'With `e`.'\ndef h(x): pass\nclass C:\n  def go(self, x): pass\n  def _go(self): pass\n"
    assert list(undocumented(src))==['C has no docstring', 'C.go has no docstring']
    assert list(undocumented("__all__ = ['f']\ndef f(n,\n b, # b\n): 'Does.'\n"))==['f: parameter n is not explained']

@pytest.mark.parametrize('module', TABLE)
def test_exports_are_documented(module):
    assert not list(undocumented((PACKAGE/f'{module}.py').read_text(encoding='utf-8')))
    assert ast.get_docstring(tree_of(module)), 'the notebook needs a subtitle: "> one line"'

# ---- notebooks
def cells(name): return json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
def text(cell): return ''.join(cell['source'])
def headings(name): return [l for c in cells(name) if c['cell_type']=='markdown' for l in text(c).splitlines() if l.startswith('#')]

@pytest.mark.parametrize('module', TABLE)
def test_a_notebook_opens_alike(module):
    cs = cells(TABLE[module][0]); first = text(cs[0])
    assert re.match(r'# .+\n\n?> .+', first), 'the first cell begins with "# Verb the noun" and "> one line"'
    exports = re.findall(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(text(c) for c in cs), re.M)
    assert exports==[module]
    assert len(cs)<=90, f'{len(cs)} cells'

@pytest.mark.parametrize('module', COURSE)
def test_a_lesson_has_its_card_and_its_end(module):
    name = TABLE[module][0]; card = '\n'.join(text(c) for c in cells(name)[1:3] if c['cell_type']=='markdown').lower()
    for word in ('you build', 'needs', 'load'): assert word in card or (word=='load' and 'artifact' in card), f'the card does not say "{word}"'
    assert re.search(r'\d', card), 'the card gives measured minutes and the machine'
    heads = headings(name)
    for h in ('## Recap', '## Exercises', '## Solutions', '## Differences from the paper'): assert h in heads, f'{h} is missing'
    start = next(i for i,c in enumerate(cells(name)) if '## Solutions' in text(c).splitlines())
    assert any(c['cell_type']=='code' and re.search(r'\bassert |\btest_\w+\(', text(c)) for c in cells(name)[start:]), 'solutions are code that is run, with asserts'

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_stored_outputs_are_good(name):
    path = ROOT/'nbs'/f'{name}.ipynb'
    assert path.stat().st_size<=2**20, f'{path.stat().st_size/2**20:.1f} MB'
    nb = json.loads(path.read_text(encoding='utf-8')); code = [c for c in nb['cells'] if c['cell_type']=='code']
    assert 'widgets' not in nb['metadata'], 'no widget state is stored'
    outs = [o for c in code for o in c['outputs']]
    assert outs, 'run the notebook and keep its outputs: they are what the reader compares with'
    assert not [o for o in outs if o['output_type']=='error'], 'an output is an error'
    assert all(c['execution_count'] is None for c in code), 'run nbdev_clean'
    figures = [''.join(v) for o in outs for k,v in o.get('data', {}).items() if k.startswith('image/')]
    assert all(len(f)<=.34*2**20 for f in figures), 'a figure is over 250 KB; draw it smaller'

def test_the_course_lists_every_notebook():
    readme,side = ((ROOT/f).read_text(encoding='utf-8') for f in ('README.md', 'nbs/sidebar.yml'))
    for name in NOTEBOOKS:
        assert f'(nbs/{name}.ipynb)' in readme and f'/blob/main/nbs/{name}.ipynb)' in readme, f'{name} needs its link and its Colab badge in README.md'
        assert f'{name}.ipynb' in side, f'{name} is missing in nbs/sidebar.yml'

# ---- the installed package
def test_the_console_script_is_installed():
    assert [e.value for e in entry_points(group='console_scripts') if e.name=='gamengen']==['gamengen_nb.cli:main']

def test_help_names_every_command_with_units_and_defaults():
    gamengen = Path(sys.executable).with_name('gamengen')
    r = subprocess.run([gamengen, '--help'], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    for c in 'train-agent record train-vae encode train tune-decoder evaluate play bench fetch run demo'.split(): assert re.search(rf'^\s+{c}\s', r.stdout, re.M), c
    one = subprocess.run([gamengen, 'run', '--help'], capture_output=True, text=True).stdout
    assert 'default:' in one and 'minutes' in one

def test_settings_and_constraints_agree():
    from configparser import ConfigParser
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8'); s = cfg['DEFAULT']
    wanted = {re.split('[<>=!~ ]', r)[0] for r in (s['requirements']+' '+s['dev_requirements']).split()}
    pinned = {re.split('[<>=!~ ;]', l)[0] for l in (ROOT/'constraints.txt').read_text().splitlines() if l and not l.startswith('#')}
    assert wanted<=pinned, f'no tested version in constraints.txt: {sorted(wanted-pinned)}'
    assert 'torchvision' not in wanted|pinned # its default wheel is not the CPU torch's partner, and diffusers breaks on the mismatch
    assert f"__version__ = \"{s['version']}\"" in (PACKAGE/'__init__.py').read_text()

# ---- files
FOREIGN = [ # spelt so that this file does not match itself
    ('a path of some machine', rb'(?<![\w.~%)}-])/(?:w[o]rk|r[o]ot|t[m]p|o[p]t|h[o]me|U[s]ers|v[a]r/folders)/[\w.-]'),
    ('a path of some machine', rb'\b[A-Z]:\\{1,2}U[s]ers\\'),
    ('the host of a package registry', rb'p[y]pi\.(?:org|python)|p[y]thonhosted|d[o]wnload\.pytorch|n[p]mjs\.org|a[n]aconda\.org|--(?:extra-)?i[n]dex-url|--f[i]nd-links'),
    ('something unfinished', rb'@@\w+@@|\| M[I]NUTES \||\bT[O]DO\b|\bF[I]XME\b|\bX[X]X\b'),
]

def readable(path):
    "A file's bytes without pictures, in which anything may occur by chance."
    if path.suffix in ('.png', '.gif', '.jpg', '.safetensors', '.npy', '.wad'): return b''
    raw = path.read_bytes()
    if path.suffix!='.ipynb': return raw
    nb = json.loads(raw)
    for c in nb['cells']:
        for o in c.get('outputs', []): o['data'] = {k:v for k,v in o.get('data', {}).items() if not k.startswith('image/')}
    said = [''.join(c['source']) for c in nb['cells']]+[json.dumps(c.get('outputs', []), ensure_ascii=False) for c in nb['cells']]
    return '\n'.join(said).encode()

@pytest.mark.parametrize('what,pattern', FOREIGN, ids=['unix-path', 'windows-path', 'registry', 'unfinished'])
def test_no_file_holds(what, pattern):
    bad = [f'{n}: {m.group().decode(errors="replace")!r}' for n in files() if (ROOT/n).is_file()
           for m in re.finditer(pattern, re.sub(rb'data:image/\w+;base64,[\w+/=]+', b'', readable(ROOT/n)))]
    assert not bad, f'{what}: '+'; '.join(bad[:10])

def test_no_picture_file_is_hidden_in_markdown():
    for name in NOTEBOOKS: assert not [c for c in cells(name) if c.get('attachments')], f'{name} has attachments'

def test_data_is_small():
    sizes = {n:(ROOT/n).stat().st_size for n in files() if n.startswith('data/')}
    assert sum(sizes.values())<=24*2**20, f'data/ has {sum(sizes.values())/2**20:.1f} MB'
    assert all(s<=16*2**20 for s in sizes.values())
    assert all((ROOT/n).stat().st_size<=16*2**20 for n in files())

def test_links_in_the_documents_lead_somewhere():
    for doc in [n for n in files() if n.endswith('.md') and not n.startswith('data/')]:
        for link in re.findall(r'\]\(([^)#\s]+)', (ROOT/doc).read_text(encoding='utf-8')):
            if '://' not in link and not link.startswith('mailto:'): assert ((ROOT/doc).parent/link).exists(), f'{doc} links to {link}, which is not there'

def test_no_stray_cache_is_tracked():
    assert not [n for n in files() if re.search(r'\.(?:pyc|tmp|log|ini)$', n) and n!='settings.ini' or '_vizdoom/' in n]
