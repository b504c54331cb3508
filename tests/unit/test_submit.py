"""hpctrain submit: one sbatch line that a person could have typed, or one sentence."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.errors import MachineError, UserError
from hpctrain.launch.resources import Request
from hpctrain.launch.submit import Submission, prepare, submit
from tests.unit.slurm_doubles import Double
from tests.unit.small_runs import command

GPU_SITE = """
HPCTRAIN_PARTITION=gpu
HPCTRAIN_ACCOUNT=proj7
HPCTRAIN_QOS=long
HPCTRAIN_GRES=gres
HPCTRAIN_GPUS_PER_NODE=8
HPCTRAIN_CPUS_PER_NODE=112
HPCTRAIN_MEMORY_PER_NODE=480G
HPCTRAIN_MAX_NODES=16
HPCTRAIN_MAX_TIME=2-00
"""
CPU_SITE = "HPCTRAIN_GRES=none\nHPCTRAIN_CPUS_PER_NODE=8\n"
CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG = "model: {name: dense}\ndata: {loader: synthetic}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration, two sites and no variables of ours or Slurm's."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "HPCTRAIN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(CONFIG)
    (tmp_path / "gpu.env").write_text(GPU_SITE)
    (tmp_path / "cpu.env").write_text(CPU_SITE)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return tmp_path


def prepared(
    request: Request, *overrides: str, site: str | None = "gpu.env", config: str = "small.yaml", **environ: str
) -> Submission:
    return prepare(Path(config), overrides, request, site and Path(site), {**os.environ, **environ})


def told_of(here: Path, submission: Submission, job: str) -> str:
    """What is said when Slurm has taken it as ``job``."""
    Double(here / "bin", "sbatch", stdout=f"{job}\n")
    return submit(submission, os.environ).text()


def refusal(request: Request, *overrides: str, site: str | None = "gpu.env", **environ: str) -> str:
    with pytest.raises(UserError) as caught:
        prepared(request, *overrides, site=site, **environ)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_line_on_a_gpu_site(here: Path) -> None:
    submission = prepared(Request(4, time_limit="12:00:00", engine="torch"), "train.epochs=3")
    assert submission.argv == (
        *("sbatch", "--parsable", "--requeue"),
        *("--nodes=4", "--ntasks-per-node=8", "--cpus-per-task=14", "--gres=gpu:8", "--mem=480G"),
        *("--partition=gpu", "--account=proj7", "--qos=long", "--time=12:00:00", "--job-name=small"),
        *(f"--output={here}/runs/small-%j.log", "--signal=B:USR1@60", "--export=ALL"),
        *(str(CHECKOUT / "slurm/train.sbatch"), "small.yaml"),
        *("--set", "train.epochs=3", "--set", "comm.engine=torch"),
    )
    assert submission.environment == {"HPCTRAIN_SITE": f"{here}/gpu.env", "HPCTRAIN_HOME": str(CHECKOUT)}


def test_the_line_on_a_cpu_site(here: Path) -> None:
    argv = prepared(Request(2, tasks_per_node=4), site="cpu.env").argv
    assert {"--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=2"} < set(argv)
    assert not [word for word in argv if word.startswith(("--gres", "--gpus", "--mem", "--time", "--partition"))]


def test_gpus_are_asked_for_as_the_site_wants(here: Path) -> None:
    (here / "gpu.env").write_text(GPU_SITE.replace("=gres", "=gpus"))
    assert "--gpus-per-node=2" in prepared(Request(1, gpus_per_node=2)).argv


@pytest.mark.parametrize(("memory", "share"), [("480G", "125829120K"), ("8", "2048K"), ("1T", "268435456K")])
def test_a_part_of_the_gpus_comes_with_that_part_of_the_node(here: Path, memory: str, share: str) -> None:
    (here / "gpu.env").write_text(GPU_SITE.replace("480G", memory))
    argv = prepared(Request(1, gpus_per_node=2)).argv
    assert {"--gres=gpu:2", "--ntasks-per-node=2", "--cpus-per-task=14", f"--mem={share}"} < set(argv)


def test_an_array_takes_turns_in_one_run_directory(here: Path) -> None:
    (here / "gpu.env").write_text(f"{GPU_SITE}HPCTRAIN_REQUEUE=no\n")
    submission = prepared(Request(1, array="3-9%1"))
    assert {"--array=3-9%1", "--no-requeue", f"--output={here}/runs/small-%A_%a.log"} < set(submission.argv)
    told = told_of(here, submission, "7")
    assert f"run directory  {here}/runs/small-7\nlog            {here}/runs/small-7_3.log\n" in told


def test_the_warning_follows_the_configuration(here: Path) -> None:
    asked = prepared(Request(1), "launch.signals=[TERM]", "launch.margin_s=99.5").argv
    assert "--signal=B:TERM@100" in asked


def test_without_signals_slurm_sends_one_that_nobody_notices(here: Path) -> None:
    """No option at all would leave the script's own `#SBATCH --signal` in force, which the ranks would die of."""
    assert "--signal=B:URG@60" in prepared(Request(1), "launch.signals=[]").argv
    script = "trap 'echo noticed' USR1; kill -URG $$; echo on"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "on\n"


def test_where_requeueing_is_forbidden_somebody_has_to_say_how_to_go_on(here: Path) -> None:
    (here / "gpu.env").write_text(f"{GPU_SITE}HPCTRAIN_REQUEUE=no\n")
    assert refusal(Request(1)) == (
        "gpu.env forbids requeueing (HPCTRAIN_REQUEUE=no), so a job that is preempted would not go on: have tasks take "
        "turns with --array 0-9%1, or do without with --set launch.max_requeues=0"
    )
    assert "--no-requeue" in prepared(Request(1), "launch.max_requeues=0").argv


def test_the_configuration_is_checked_with_the_sites_engine(here: Path) -> None:
    """The job lays it over the file: what goes with the file's own alone would fail after hours in the queue."""
    (here / "small.yaml").write_text(f"{CONFIG}comm: {{horovod: {{cycle_time_ms: 1}}}}\n")
    text = "horovod.cycle_time_ms is a setting of Horovod's, but engine is torch: leave it out"
    assert text in refusal(Request(1), HPCTRAIN_ENGINE="torch")
    (here / "gpu.env").write_text(f"{GPU_SITE}HPCTRAIN_ENGINE=torch\n")
    assert text in refusal(Request(1))
    assert prepared(Request(1, engine="horovod")), "--engine comes before the site's"
    (here / "small.yaml").write_text(f"{CONFIG}comm: {{engine: serial}}\n")
    assert "comm.engine=torch" not in prepared(Request(2)).argv, "the script knows the site's engine itself"


def test_the_site_may_come_from_the_environment(here: Path) -> None:
    submission = prepared(Request(1), site=None, HPCTRAIN_SITE="gpu.env", HPCTRAIN_RUNS="elsewhere")
    assert submission.environment["HPCTRAIN_SITE"] == f"{here}/gpu.env"
    assert f"run directory  {here}/elsewhere/small-7\n" in told_of(here, submission, "7")


def test_a_run_directory_that_is_there_can_be_named(here: Path) -> None:
    submission = prepared(Request(1), HPCTRAIN_RUN_DIR="runs/small-3{x}%j%%")
    assert "run directory  runs/small-3{x}%j%%\n" in told_of(here, submission, "7")


OPTIONS = ("--exclude=n3", "--constraint=a100&ib", "--reservation=x", "--exclusive", "--mail-user=me@x", "--time-min=5")


def test_other_options_of_sbatch_stand_before_the_script(here: Path) -> None:
    argv = prepared(Request(1, more=OPTIONS)).argv
    before, script = argv[: -len(OPTIONS) - 2], argv[-2:]
    assert argv == (*before, *OPTIONS, *script)
    assert before == prepared(Request(1)).argv[:-2]


@pytest.mark.parametrize(
    "word",
    ["--nodes=2", "--nodes", "--gres=gpu:1", "--time=5", "--tim=5", "--array=0-3", "--signal=INT", "--export=NONE"],
)
def test_an_option_that_would_undo_what_submit_decides(here: Path, word: str) -> None:
    assert refusal(Request(1, more=("--exclusive", word))) == (
        f"{word!r} behind -- would undo what submit decides: use its own options (hpctrain submit --help), the site "
        "file or the configuration"
    )


@pytest.mark.parametrize("word", ["train.epochs=3", "-N4", "-x", "n3", "--", "--=x", "", "--a b"])
def test_a_word_that_sbatch_might_take_for_its_script(here: Path, word: str) -> None:
    assert refusal(Request(1, more=(word,))) == (
        f"{word!r} is no option for sbatch: write one as --NAME or --NAME=VALUE behind --, and a change to the "
        "configuration as --set KEY=VALUE"
    )


def test_a_script_where_the_user_stands_comes_first(here: Path) -> None:
    (here / "slurm").mkdir()
    (here / "slurm/train.sbatch").write_text("#!/bin/sh\n")
    assert prepared(Request(1)).script == here / "slurm/train.sbatch"


@pytest.mark.parametrize(
    ("request_", "overrides", "site", "text"),
    [
        (Request(17), (), "gpu.env", "--nodes is 17, but gpu.env gives a job at most 16 (HPCTRAIN_MAX_NODES)"),
        (Request(1, gpus_per_node=9), (), "gpu.env", "--gpus-per-node is 9, but a node of gpu.env has 8: ask for 1 to"),
        (Request(1, gpus_per_node=0), (), "gpu.env", "--gpus-per-node is 0, but a node of gpu.env has 8: ask for 1 to"),
        (Request(1, tasks_per_node=4), (), "gpu.env", "--tasks-per-node is 4, but each rank has a GPU of its own, and"),
        (Request(1, time_limit="3-00"), (), "gpu.env", "--time is 3-00, but gpu.env gives a job at most 2-00"),
        (
            Request(1, time_limit="1"),
            (),
            "gpu.env",
            "a job of 1 would be over before it trains, since its last 60 s are",
        ),
        (Request(1, time_limit="soon"), (), "gpu.env", "--time is 'soon', but must be a time as Slurm writes it"),
        (Request(2, engine="serial"), (), "gpu.env", "the serial engine is one process, but 2 x 8 ranks were asked"),
        (
            Request(2),
            ("comm.engine=serial",),
            "gpu.env",
            "the serial engine is one process, but 2 x 8 ranks were asked",
        ),
        (Request(1, engine="nccl"), (), "gpu.env", 'comm.engine is "nccl" (--set comm.engine=nccl), but must be'),
        (Request(1, array="0-9"), (), "gpu.env", "--array is '0-9', but its tasks take turns in one run directory"),
        (Request(1, array="x%1"), (), "gpu.env", "--array is 'x%1', but its tasks take turns in one run directory"),
        (Request(1, gpus_per_node=2), (), "cpu.env", "cpu.env is a site without GPUs, but --gpus-per-node 2: leave"),
        (Request(1), ("train.device=cuda",), "cpu.env", "cpu.env is a site without GPUs, but train.device=cuda: leave"),
        (Request(1), (), "cpu.env", "cpu.env is a site without GPUs: say how many ranks a node has with --tasks-per"),
        (Request(1, tasks_per_node=9), (), "cpu.env", "9 ranks a node are more than its 8 CPUs (cpu.env): ask for"),
        (Request(1), ("trian.epochs=1",), "gpu.env", "trian (--set trian.epochs=1) is an unknown key; did you mean"),
        (Request(1), (), None, "no site file: name one with --site or HPCTRAIN_SITE (slurm/sites has examples"),
        (Request(1), (), "none.env", "there is no site file none.env: copy slurm/sites/template.env there"),
    ],
)
def test_what_the_site_cannot_give_is_refused(
    here: Path, request_: Request, overrides: tuple[str, ...], site: str | None, text: str
) -> None:
    assert refusal(request_, *overrides, site=site).startswith(text)


@pytest.mark.parametrize("key", ["GRES", "GPUS_PER_NODE", "CPUS_PER_NODE"])
def test_a_site_that_lacks_a_needed_key(here: Path, key: str) -> None:
    (here / "gpu.env").write_text("".join(line + "\n" for line in GPU_SITE.splitlines() if key not in line))
    told = f"gpu.env lacks HPCTRAIN_{key}, which this submission needs: add it (slurm/sites/template.env tells"
    assert refusal(Request(1)).startswith(told)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOBID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_CPUS_PER_TASK"])
def test_variables_of_an_outer_allocation_are_refused(here: Path, name: str) -> None:
    text = refusal(Request(1), **{name: "3"})
    assert text.startswith(f"this shell has the variables of another allocation ({name}=3)")
    assert f"or `unset {name}` first" in text


def test_only_the_variables_of_the_allocation_are_to_be_unset(here: Path) -> None:
    """A module may have set the others for good, SLURM_CONF for one."""
    text = refusal(Request(1), SLURM_JOB_ID="3", SLURM_CONF="/etc/slurm.conf", SLURM_NTASKS="2")
    assert text.endswith("submit from a login shell, or `unset SLURM_JOB_ID SLURM_NTASKS` first")


def test_settings_of_slurm_itself_are_none(here: Path) -> None:
    assert prepared(Request(1), SLURM_CONF="/etc/slurm.conf", SLURM_TIME_FORMAT="standard")


def test_runs_that_no_shell_here_can_name(here: Path) -> None:
    (here / "gpu.env").write_text(f"{GPU_SITE}HPCTRAIN_RUNS=$NO_SUCH_NAME/runs\n")
    assert refusal(Request(1)).startswith("HPCTRAIN_RUNS is '$NO_SUCH_NAME/runs': give it without backslashes")


def test_no_script(here: Path) -> None:
    assert refusal(Request(1), HPCTRAIN_HOME="/nowhere").startswith("there is no slurm/train.sbatch in /nowhere: go to")


def test_no_folder_for_runs(here: Path) -> None:
    (here / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"runs cannot be made \(File exists\): set HPCTRAIN_RUNS"):
        submit(prepared(Request(1)), os.environ)


def test_slurm_is_missing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here / "bin"))
    with pytest.raises(UserError, match="sbatch is not on PATH: run this on a login node of a Slurm cluster"):
        submit(prepared(Request(1)), os.environ)


def test_what_slurm_refuses_is_told_in_its_words(here: Path) -> None:
    words = "sbatch: error: Batch job submission failed: Invalid job array specification\n"
    Double(here / "bin", "sbatch", stderr=words, status=1)
    with pytest.raises(UserError) as caught:
        submit(prepared(Request(1, array="0-99999999%1")), os.environ)
    assert str(caught.value) == (
        "Slurm refuses the job (Batch job submission failed: Invalid job array specification): change the option, or "
        f"the key of {here}/gpu.env, that it names"
    )


def test_a_controller_that_does_not_answer_is_the_machines_fault(here: Path) -> None:
    words = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n"
    Double(here / "bin", "sbatch", stderr=words, status=1)
    with pytest.raises(MachineError, match="Slurm's controller does not answer .*: see `scontrol ping`"):
        submit(prepared(Request(1)), os.environ)


AWKWARD = st.text(st.sampled_from(" '\"$()`\\;&|<>*?~#%{}!\n\té-a=,"), min_size=1, max_size=10)


@settings(max_examples=20)
@given(name=AWKWARD, stem=AWKWARD.map(lambda text: text.replace("/", "")), value=AWKWARD, comment=AWKWARD)
def test_awkward_words_arrive_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, name: str, stem: str, value: str, comment: str
) -> None:
    folder = tmp_path_factory.mktemp("awk ward")
    config = folder / f"{stem}.yaml"
    config.write_text(CONFIG)
    site = folder / "the site.env"
    site.write_text(GPU_SITE)
    sbatch = Double(folder, "sbatch", stdout="4242;cluster\n")
    environ = {"PATH": f"{folder}:/usr/bin:/bin", "HPCTRAIN_RUNS": str(folder / "all runs")}
    override = "data.path=" + _yaml(value)
    request = Request(2, job_name=name, more=(f"--comment={comment}",))
    submission = prepare(config, [override], request, site, environ)
    job = submit(submission, environ)
    (argv,) = sbatch.calls
    assert argv == list(submission.argv[1:])
    assert f"--job-name={name}" in argv
    assert argv[-5:] == [f"--comment={comment}", str(CHECKOUT / "slurm/train.sbatch"), str(config), "--set", override]
    assert sbatch.environ["HPCTRAIN_SITE"] == str(site)
    assert job.id == "4242"
    assert job.run_dir == f"{folder}/all runs/{stem}-4242"
    assert f"run directory  {job.run_dir}\n" in job.text() and "squeue --job 4242\n" in job.text()
    assert sorted(path.name for path in folder.iterdir() if path.suffix == "") == ["all runs", "sbatch"]


def _yaml(value: str) -> str:
    import yaml

    return yaml.safe_dump(value, allow_unicode=True, default_style='"', width=1000).rstrip("\n")


def test_a_dry_run_can_be_pasted_into_a_shell(here: Path) -> None:
    sbatch = Double(here / "bin", "sbatch", stdout="1\n")
    words = ["--nodes", "2", "--job-name", "a 'b'\n$(touch boo)", "--set", "data.path=x $HOME", "--site", "gpu.env"]
    more = ["--dry-run", "--", "--exclude=n3", "--comment=c 'd'\n$(touch boo)"]
    done = command("submit", "small.yaml", *words, *more)
    line, _, script = done.out.partition(f"\n\n# {CHECKOUT}/slurm/train.sbatch\n")
    assert not done.code and not sbatch.calls and not (here / "runs").exists()
    assert script.strip() == (CHECKOUT / "slurm/train.sbatch").read_text().strip()
    subprocess.run(["bash", "-c", line], check=True, timeout=30)
    (argv,) = sbatch.calls
    assert "--job-name=a 'b'\n$(touch boo)" in argv and argv[-1] == "data.path=x $HOME"
    assert {"--exclude=n3", "--comment=c 'd'\n$(touch boo)"} < set(argv)
    assert sbatch.environ["HPCTRAIN_HOME"] == str(CHECKOUT)
    assert not (here / "boo").exists()


def test_what_scripts_read_stands_alone(here: Path) -> None:
    Double(here / "bin", "sbatch", stdout="4242;cluster\n")
    done = command("submit", "small.yaml", "--nodes", "2", "--site", "gpu.env", "--parsable")
    assert not done.code
    assert done.out == f"4242\n{here}/runs/small-4242\n{here}/runs/small-4242.log\n"


def test_it_takes_no_time_and_no_torch(here: Path) -> None:
    """Half a second is the aim; a loaded machine is no reason to fail, so processor time is what counts."""
    Double(here / "bin", "sbatch", stdout="4242\n")
    code = (
        "import sys; from hpctrain.cli import main\n"
        "sys.argv = ['hpctrain', 'submit', 'small.yaml', '--nodes', '2', '--site', 'gpu.env']\n"
        "try:\n    main()\nexcept SystemExit as leave:\n    assert not leave.code\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "job            4242\n" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
