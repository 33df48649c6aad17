"""All tests, part by part, with the seconds each part took. `make test` calls it; so can you: `.venv/bin/python tests/run_all.py`.

    tests/run_all.py              everything
    tests/run_all.py clean wheel  only these parts (clean, project, wheel, notebooks, pytest)
"""
import hashlib, os, re, shutil, signal, subprocess, sys, sysconfig, tempfile, threading, time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LIMIT = 20*60 # what `make test` may take on 2 quiet cores, the environment included (s)
SKIP = {'.git', '.venv', 'runs', 'build', 'dist', '_proc', '_docs', '__pycache__', '.pytest_cache', '.ipynb_checkpoints', '_vizdoom', '_shots'}

def files():
    "Every file that belongs to the project: what git tracks or would track; without git, all but the usual leftovers."
    try:
        out = subprocess.run(['git', '-C', ROOT, 'ls-files', '-coz', '--exclude-standard'], capture_output=True, check=True).stdout
        names = [os.fsdecode(n) for n in out.split(b'\0') if n]
    except (OSError, subprocess.CalledProcessError):
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob('*') if not SKIP.intersection(p.relative_to(ROOT).parts)
                 and not any(x.endswith('.egg-info') for x in p.relative_to(ROOT).parts) and not p.name.endswith('.tmp')]
    return sorted({n for n in names if (ROOT/n).is_file()})

def digests(root): return {n:hashlib.sha256((root/n).read_bytes()).hexdigest() for n in files() if (root/n).exists()}

def copy_tree(dst):
    for n in files(): (dst/n).parent.mkdir(parents=True, exist_ok=True); shutil.copy2(ROOT/n, dst/n)
    return dst

def call(*cmd, cwd=ROOT, show=True, keep=False, **env):
    "Run a command to its end: its return code and, with `keep`, its output. Without `show` the output is printed only if it failed."
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace') if keep or not show else {}
    p = subprocess.Popen([str(c) for c in cmd], cwd=cwd, env=os.environ|env, stdin=subprocess.DEVNULL, start_new_session=True, **pipe)
    late = threading.Timer(LIMIT, lambda: os.killpg(p.pid, signal.SIGKILL)); late.daemon = True; late.start(); lines = []
    try:
        for line in p.stdout or ():
            lines.append(line)
            if show: print(line, end='')
        rc = p.wait()
    except BaseException: os.killpg(p.pid, signal.SIGTERM); raise # Ctrl-C ends the command with all its children
    finally: late.cancel()
    if rc and not show: print(*lines, sep='')
    if rc==-signal.SIGKILL: print(f'{Path(cmd[0]).name} was killed (after {LIMIT//60} minutes a part is ended).')
    return rc, ''.join(lines)

# ---- the parts: each returns (passed, failed, skipped)
def clean(tmp):
    "Cleaning and exporting a copy of the tree changes no file."
    tree = copy_tree(tmp/'tree'); before = digests(tree)
    for tool in ('nbdev_clean', 'nbdev_export'):
        if call(BIN/tool, cwd=tree, show=False)[0]: print(f'{tool} failed'); return 0, 1, 0
    after = {n:hashlib.sha256((tree/n).read_bytes()).hexdigest() if (tree/n).exists() else '' for n in before}
    new = [str(p.relative_to(tree)) for d in ('nbs', 'gamengen_nb') for p in (tree/d).rglob('*')
           if p.is_file() and '__pycache__' not in p.parts and str(p.relative_to(tree)) not in before]
    bad = sorted(n for n in before if before[n]!=after[n])+new
    for n in bad: print(f'{n} is not what nbdev_clean and nbdev_export make of the notebooks; run both and keep the result.')
    return (0, 1, 0) if bad else (1, 0, 0)

def wheel(tmp):
    "A wheel, built from a copy and installed into an environment of its own, works in an empty folder and carries no data."
    tree = copy_tree(tmp/'source'); env = tmp/'env'; empty = tmp/'empty'; empty.mkdir()
    if call(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp/'dist', tree, show=False)[0]: return 0, 1, 0
    whl, = (tmp/'dist').glob('*.whl')
    if call(sys.executable, '-m', 'venv', env, show=False)[0]: return 0, 1, 0
    python = env/'bin'/'python'
    if call(python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', '--no-index', '--no-deps', whl, show=False)[0]: return 0, 1, 0
    # What the wheel requires is borrowed from the environment that runs this, since a second torch costs minutes: its site-packages come
    # last on the path, and .pth files inside it (the editable install of this checkout) are not followed.
    site, = (env/'lib').glob('python*/site-packages')
    (site/'borrowed.pth').write_text(sysconfig.get_paths()['purelib']+'\n')
    shutil.copy(ROOT/'tests'/'use_wheel.py', tmp/'use_wheel.py')
    rc,_ = call(python, tmp/'use_wheel.py', whl, ROOT/'data', cwd=empty, GAMENGEN_HOME=str(tmp/'home'), PYTHONPATH='')
    return (1, 0, 0) if rc==0 else (0, 1, 0)

def notebooks(tmp):
    "Every notebook runs from top to bottom under the preset `tiny`."
    names = [p.name for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if not p.name.startswith(('_', '.'))]
    rc,out = call(BIN/'nbdev_test', '--n_workers', 2, '--timing', '--do_print', keep=True, PYTHONUNBUFFERED='1', IN_TEST='1', GAMENGEN_PRESET='tiny')
    failed = [n for n in names if re.search(rf'^\s+{re.escape(n)}$', out.split('Failed On The Following')[-1], re.M)] if rc else []
    done = len(re.findall(r'^\S+\.ipynb: \d+ secs', out, re.M))
    if rc==0 and done!=len(names): print(f'nbdev_test ran {done} of {len(names)} notebooks.'); return done, len(names)-done, 0
    return (len(names)-max(1, len(failed)), max(1, len(failed)), 0) if rc else (len(names), 0, 0)

def run_pytest(tmp, name, *args):
    xml = tmp/f'{name}.xml'
    rc,_ = call(sys.executable, '-m', 'pytest', '-q', '-rs', '-p', 'no:cacheprovider', '--durations=8', '--durations-min=3', f'--junitxml={xml}', *args)
    try: s = ET.parse(xml).getroot().find('testsuite').attrib
    except (OSError, ET.ParseError, AttributeError): return 0, 1, 0
    bad,skip = int(s['failures'])+int(s['errors']), int(s['skipped'])
    return int(s['tests'])-bad-skip, max(bad, int(rc not in (0, 5))), skip

def project(tmp):
    "The rules of the project: import table, documentation of functions, shape of the notebooks, sizes, what must not be in a file."
    return run_pytest(tmp, 'project', 'tests/test_project.py')

def pytest(tmp):
    "All other tests, the browser's included; each file in a process of its own, since games, windows and signal handlers outlive a test."
    rows = [run_pytest(tmp, p.stem, f'tests/{p.name}') for p in sorted((ROOT/'tests').glob('test_*.py')) if p.name!='test_project.py']
    return tuple(map(sum, zip(*rows)))

PARTS = dict(clean=clean, project=project, wheel=wheel, notebooks=notebooks, pytest=pytest)

def main(names):
    unknown = set(names)-set(PARTS)
    if unknown: sys.exit(f"There is no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}.")
    try: setup = int((BIN.parent/'.ok').read_text())
    except (OSError, ValueError): setup = 0
    sys.stdout.reconfigure(line_buffering=True)
    before = set(files()); rows = []; start = time.time()
    with tempfile.TemporaryDirectory(prefix='gamengen-test-') as tmp:
        tmp = Path(tmp).resolve(); (tmp/'home').mkdir()
        # one thread each, since two notebooks run side by side; nothing from a network; caches of our own
        os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', HF_HUB_OFFLINE='1', HF_HOME=str(tmp/'hf'), GAMENGEN_HOME=str(tmp/'home'))
        for name in names or PARTS:
            print(f'\n== {name}: {PARTS[name].__doc__}'); t = time.time(); (tmp/name).mkdir()
            rows.append((name, *PARTS[name](tmp/name), time.time()-t))
    new = sorted(set(files())-before)
    if new: rows.append(('leftovers', 0, 1, 0, 0.)); print('\nThe tests left files behind: '+', '.join(new))
    took = time.time()-start
    print('\n{:<12}{:>8}{:>8}{:>9}{:>9}'.format('part', 'passed', 'failed', 'skipped', 'seconds'))
    for r in rows: print('{:<12}{:>8}{:>8}{:>9}{:>9.0f}'.format(*r))
    if setup: print(f'{"environment":<12}{"":>25}{setup:>9} (when it was made)')
    if took+setup>LIMIT: print(f'This is over the {LIMIT//60} minutes that 2 quiet cores should need; make something faster.')
    p,f,s = (sum(r[i] for r in rows) for i in (1, 2, 3))
    print(f'{p} passed, {f} failed'+(f', {s} skipped' if s else '')+f' in {took:.0f} s')
    return 1 if f else 0

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
