/* From an exec request to the leader, the process that has become the program. */
#ifndef APOTHIC_LEADER_H
#define APOTHIC_LEADER_H

#include <stdint.h>
#include <sys/types.h>

#include "identity.h"
#include "keeper.h"

struct failure {
    int32_t error;
    uint32_t stage;
};

/* Start the leader and wait until it has become the program, or told why it could not: they share
   their memory until then. vfork costs a third of fork here. A failure may leave a process to
   collect, whose id is given in any case. */
pid_t leader_start(const struct exec_request *request, const struct keeper_ends *ends,
                   const struct identity *who, const struct agent_origin *origin,
                   struct failure *failure);

#endif
