"""Running in Kubernetes: RayJobs for recipes, and the start of one from within a cluster.

`rayjob.yaml` is the one place that says how our pods look; `k8s/` in the repository is what is applied around them.
Not for: objects of a cluster that belong to no job (k8s/base), and the Ray Jobs API.
"""
