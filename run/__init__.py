"""Puts a run together from flags; beside the scripts the only code that reads them.

The modules in the order in which a run needs them:

- what is asked: `flag_checks` (across flags), `student_flags` (those that a student answers itself), `plan` (stages,
  their order and length), `mixing` (what a stage reads beside its data set)
- where it stands: `beginning` (folder, lock, who is told) asks `resume` (which checkpoint, and whether flags allow
  it) by the table of `resume_rules` (what a changed flag does); `resumption` then puts that checkpoint back, and
  `resumed_schedule` the schedule of its stage
- what it takes: `inputs` (what can be wrong before any weight is loaded), `text`, `forecast` and `measuring` (the
  plan and time of `--dry_run`), `written` (what stands in the folder before the first step)
- the pair: `build`, or `sharded_build` under FSDP2; `acceleration`; `pair`, what they make
- the stages: `stages` (micro step, optimizer, schedule), `session` (what a stage begins with and the loop calls)
- on the way: `signals`, `saving`, `telling`, `tracking` with `wandb_run` and `metrics_file`, `terminal`, `pages`
- the end: `failure` (one line and an exit status)
"""
