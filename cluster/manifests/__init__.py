"""Where a job runs when one machine is not enough: KubeRay manifests and Slurm scripts, rendered from the job's own config."""
