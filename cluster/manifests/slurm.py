"""A Slurm job: `ray symmetric-run` starts Ray on every node, runs the command on the first, and ends Ray with it."""

from __future__ import annotations

import shlex

from fewstep.cluster.manifests.settings import ManifestConfig


def sbatch(config: ManifestConfig, job_yaml: str) -> str:
    """The script. Given again after a time limit it goes on from the job's checkpoint."""
    group, slurm = config.workers[0], config.slurm
    directives = [
        f"--job-name={config.name}",
        f"--nodes={max(1, group.replicas)}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={group.cpus}",
        f"--mem={group.memory_gib}G",
        f"--time={slurm.time}",
        "--requeue",
        f"--output={config.name}-%j.log",
    ]
    if group.gpus:
        kind = f"{group.gpu_type}:" if group.gpu_type else ""
        directives.append(f"--gres=gpu:{kind}{group.gpus}")
    if slurm.partition:
        directives.append(f"--partition={slurm.partition}")
    job = f"{config.shared_folder}/{config.name}-job-$SLURM_JOB_ID.yaml"
    resources = f"--num-cpus={group.cpus}" + (f" --num-gpus={group.gpus}" if group.gpus else "")
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {directive}" for directive in directives),
        "set -euo pipefail",
        *slurm.setup,
        "",
        "export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE RAY_USAGE_STATS_ENABLED=0",
        "# Ray's servers listen on the node's network: whoever talks to them shows this job's token.",
        f'token="{config.shared_folder}/{config.name}-token-$SLURM_JOB_ID"',
        f'job="{job}"',
        'trap \'rm -f "$token" "$job"\' EXIT',
        '(umask 077; head -c 32 /dev/urandom | od -An -tx1 | tr -d " \\n" > "$token")',
        'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"',
        "cat > \"$job\" <<'FEWSTEP_JOB'",
        job_yaml.rstrip("\n"),
        "FEWSTEP_JOB",
        "",
        # sed and not head, whose early end would break scontrol's pipe and with it this script.
        'head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"',
        f'address="$head:{slurm.port}"',
        'srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \\',
        f'  ray symmetric-run --address "$address" --min-nodes "$SLURM_NNODES" {resources} -- \\',
        f'  fewstep {shlex.quote(config.job)} "$job" --ray-address "$address"',
    ]
    return "\n".join(lines) + "\n"
