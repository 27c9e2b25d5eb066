class D:
    def __init__(s,o): s.o=o
    def ray_options(s): return s.o
class P:
    def __init__(s,o): s.demands=[D(o)]
    def explain(s): return ""
def plan(constraints,*,cpu,memory_mb,nodes): return P({"num_cpus":cpu,"memory":memory_mb*1024*1024})
