"""Objectives: what a training update minimises. Plug-ins, named by a short name or a dotted path."""

OBJECTIVES = {
    "seed": "fewstep.pipelines.objectives.seed:Seed",
    "trace": "fewstep.pipelines.objectives.trajectory:Trace",
    "coupled": "fewstep.pipelines.objectives.coupled:Coupled",
    "distill": "fewstep.pipelines.objectives.distill:Distill",
}
