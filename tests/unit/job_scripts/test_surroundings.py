"""What a site's jobs have around them: containers, modules, data staged to each node, Slurm's PMIx."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.unit.job_scripts.conftest import GPUS, MPI_LIST, SLURM, STAGED, entered, packed, recorded, run
from tests.unit.slurm_doubles import Double


def test_the_site_file_reaches_ranks_and_script(job: Path) -> None:
    site = job / "my site.env"
    lines = ["HPCTRAIN_ENGINE=torch", "HPCTRAIN_MPI=none", "HPCTRAIN_RUNS='all runs'", "NCCL_DEBUG=WARN"]
    site.write_text("\n".join(lines) + "\n")
    done = run(job, "small.yaml", "seed=2", HPCTRAIN_SITE=str(site))
    assert done.returncode == 0, done.stderr
    srun = recorded(job, "srun")
    assert srun.environ["NCCL_DEBUG"] == "WARN"
    argv = srun.calls[-1]
    assert "--mpi=none" in argv
    assert argv[argv.index("small.yaml") + 1 :][:4] == ["--set", "comm.engine=torch", "--set", "seed=2"]
    assert argv[-1] == "all runs/small-30077"


def test_what_was_exported_for_the_job_comes_before_the_site_file(job: Path) -> None:
    site = job / "site.env"
    site.write_text("HPCTRAIN_RUNS=\nHPCTRAIN_ENGINE=torch\nHPCTRAIN_SCRATCH=/raid\n")
    exported = {"HPCTRAIN_RUNS": "my 'runs' $HOME", "HPCTRAIN_ENGINE": "mpi", "HPCTRAIN_SCRATCH": ""}
    assert run(job, "small.yaml", HPCTRAIN_SITE=str(site), **exported).returncode == 0
    srun = recorded(job, "srun")
    assert srun.calls[-1][-1] == "my 'runs' $HOME/small-30077"
    assert "comm.engine=mpi" in srun.calls[-1]
    assert {name: srun.environ[name] for name in exported} == {**exported, "HPCTRAIN_SCRATCH": "/raid"}


def test_a_container_is_entered_with_its_gpus_and_folders(job: Path) -> None:
    (job / "my image.sif").touch()
    configs, runs, disk = job / "recipes of mine", job / "all runs", job / "not yet/there"
    configs.mkdir()
    config = shutil.copy(job / "small.yaml", configs)
    settings = {"HPCTRAIN_CONTAINER": "my image.sif", "HPCTRAIN_RUNS": str(runs)}
    assert run(job, str(config), **settings, **GPUS).returncode == 0
    argv = recorded(job, "srun").calls[-1]
    assert entered(job, argv, job, runs, configs, gpus=True)[:4] == ["python", "-m", "hpctrain", "train"]
    stage = {"HPCTRAIN_STAGE": packed(job), "HPCTRAIN_SCRATCH": str(disk)}
    assert run(job, str(config), **settings, **stage).returncode == 0
    assert entered(job, recorded(job, "srun").calls[-1], job, runs, configs, disk)[0] == "python"
    assert run(job, script=SLURM / "allreduce.sbatch", **settings).returncode == 0
    assert entered(job, recorded(job, "srun").calls[-1], job, runs)[:4] == ["python", "-m", "hpctrain", "bench"]


def test_a_container_sees_a_folder_by_the_name_it_is_told_by_too(job: Path) -> None:
    (job / "my image.sif").touch()
    (job / "real").mkdir()
    (job / "runs").symlink_to(job / "real")
    assert run(job, "small.yaml", HPCTRAIN_CONTAINER="my image.sif", HPCTRAIN_RUNS=str(job / "runs")).returncode == 0
    argv = recorded(job, "srun").calls[-1]
    assert argv[argv.index(str(job / "real")) :][:3] == [str(job / "real"), "--bind", f"{job}/real:{job}/runs"]


def test_modules_are_loaded_where_the_shell_does_not_know_them_yet(job: Path) -> None:
    (job / "modules/init").mkdir(parents=True)
    (job / "modules/init/bash").write_text('false\nmodule() { [[ $2 != none ]] && export LOADED="$*$NOWHERE"; }\n')
    modules = {"MODULESHOME": str(job / "modules"), "HPCTRAIN_MODULES": "gcc cuda/13"}
    done = run(job, "small.yaml", **modules)
    assert done.returncode == 0, done.stderr
    assert recorded(job, "srun").environ["LOADED"] == "load gcc cuda/13"
    done = run(job, "small.yaml", **modules | {"HPCTRAIN_MODULES": "none"})
    assert done.returncode == 2
    assert done.stderr == "train.sbatch: module load none failed: correct HPCTRAIN_MODULES\n"


def test_a_node_without_modules_is_told_so(job: Path) -> None:
    if any(Path("/etc/profile.d", name).exists() for name in ("lmod.sh", "modules.sh")):
        pytest.skip("this machine has modules")
    done = run(job, "small.yaml", HPCTRAIN_MODULES="gcc")
    assert done.returncode == 2
    assert "has no `module` command for HPCTRAIN_MODULES=gcc: export MODULESHOME, the folder that has" in done.stderr


def test_a_site_file_that_asks_for_what_is_not_set_is_named(job: Path) -> None:
    site = job / "site.env"
    site.write_text("HPCTRAIN_MPI=pmix\nHPCTRAIN_SCRATCH=$SITE_DISK/data\n")
    done = run(job, "small.yaml", HPCTRAIN_SITE=str(site))
    assert done.returncode == 2
    assert f"the site file {site} does not work on node" in done.stderr
    assert "(line 2: SITE_DISK: unbound variable): correct that line, or export what it uses" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert run(job, "small.yaml", HPCTRAIN_SITE=str(site), SITE_DISK="/disk").returncode == 0


@pytest.mark.parametrize("own", [False, True])
def test_what_is_staged_is_what_is_trained_on(job: Path, own: bool) -> None:
    source = packed(job)
    overrides = [*([f"data.path={source}/"] if own else []), "seed=2"]
    assert run(job, "small.yaml", *overrides, HPCTRAIN_STAGE=source, HPCTRAIN_SCRATCH="/disk").returncode == 0
    staging, preflight, training = recorded(job, "srun").calls[1:]
    assert staging[-4:-1] == ["bash", str(SLURM / "stage_in.sh"), source]
    assert staging[-1] == STAGED
    assert {"--ntasks=2", "--cpus-per-task=8", "--wait=0"} <= set(staging)
    sets = [word for name in [*overrides, f"data.path={staging[-1]}"] for word in ("--set", name)]
    for argv in (preflight, training):
        assert argv[argv.index("small.yaml") + 1 :][: len(sets)] == sets


def test_each_version_of_a_data_set_has_a_folder_of_its_own(job: Path) -> None:
    def staged(manifest: str) -> str:
        srun = Double(job / "bin", "srun", first=MPI_LIST)
        stage = {"HPCTRAIN_STAGE": packed(job, manifest), "HPCTRAIN_SCRATCH": "/disk"}
        assert run(job, "small.yaml", **stage).returncode == 0
        return next(call[-1] for call in reversed(srun.calls) if call[-3].endswith("stage_in.sh"))

    first, other, again = staged("1"), staged("2"), staged("1")
    assert first == again != other


def test_another_data_set_than_the_staged_one_is_refused(job: Path) -> None:
    done = run(job, "small.yaml", "data.path=/data/other", HPCTRAIN_STAGE=packed(job), HPCTRAIN_SCRATCH="/disk")
    assert done.returncode == 2
    told = f"the data set that is staged, HPCTRAIN_STAGE={packed(job)}: leave one of the two out"
    assert done.stderr == f"train.sbatch: data.path=/data/other is not {told}\n"
    assert not recorded(job, "srun").calls


def test_what_is_no_packed_data_set_is_not_staged(job: Path) -> None:
    done = run(job, "small.yaml", HPCTRAIN_STAGE="/no set", HPCTRAIN_SCRATCH="/disk")
    assert done.returncode == 2
    assert done.stderr.startswith("train.sbatch: /no set/dataset.json cannot be read on node ")
    assert done.stderr.endswith("let HPCTRAIN_STAGE name a folder that `hpctrain data pack` has finished\n")


def test_a_pmix_that_slurm_has_not_is_told_before_anything_starts(job: Path) -> None:
    srun = Double(job / "bin", "srun", stdout="MPI plugin types are...\n\tnone\n\tpmi2\n")
    for asked in ("", "pmix_v4"):
        done = run(job, "small.yaml", HPCTRAIN_MPI=asked)
        assert done.returncode == 2
        assert done.stderr == (
            f"train.sbatch: this Slurm has no {asked or 'pmix'} for ranks to find each other by (srun --mpi=list): set "
            "HPCTRAIN_MPI to the pmix that it has, or to none together with HPCTRAIN_ENGINE=torch\n"
        )
    assert srun.calls == [["--mpi=list"]] * 2
