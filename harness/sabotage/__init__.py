"""Planted faults: what a falsifier must catch before its silence counts. They patch the program from outside."""

FAULT_MODULES = (
    "q4kd.harness.sabotage.faults_quant",
    "q4kd.harness.sabotage.faults_models",
    "q4kd.harness.sabotage.faults_backend",
    "q4kd.harness.sabotage.faults_cuda",
    "q4kd.harness.sabotage.faults_precision",
    "q4kd.harness.sabotage.faults_memory",
    "q4kd.harness.sabotage.faults_training",
    "q4kd.harness.sabotage.faults_loss",
    "q4kd.harness.sabotage.faults_runs",
    "q4kd.harness.sabotage.faults_guards",
    "q4kd.harness.sabotage.faults_export",
    "q4kd.harness.sabotage.faults_data",
    "q4kd.harness.sabotage.faults_student",
    "q4kd.harness.sabotage.faults_robust",
    "q4kd.harness.sabotage.faults_cache",
)
