"""The two protocols: user process ⇄ coordinator (`client`), coordinator ⇄ worker (`worker`), and what they share.

A message is a frozen, tagged, array-like struct; fields are only ever appended, with defaults. Any other change
raises `PROTOCOL_VERSION`.
"""

from sempre.ipc.config import WorkerConfig
from sempre.ipc.messages.client import (
    AbortRequests,
    AddRequests,
    CallWorkers,
    CallWorkersReply,
    ClientCommand,
    ClientEvent,
    ClientHello,
    EngineFailed,
    EngineNotice,
    EngineReady,
    GetHealth,
    GetMetrics,
    HealthReply,
    MetricsReply,
    OutputsReady,
    RequestOutputDelta,
    RequestSpec,
    ResetPrefixCache,
    ResetPrefixCacheReply,
    ShutdownEngine,
    StalledRequests,
    StartupProgress,
    WorkerHealth,
    WorkerState,
    WorkerStateChanged,
)
from sempre.ipc.messages.common import (
    NOT_READY,
    PROTOCOL_VERSION,
    ErrorInfo,
    Heartbeat,
    LogprobRows,
    Message,
    PoolingModel,
    PoolingSpec,
    ReasoningSpec,
    Refused,
    RngDigests,
    SamplingSpec,
)
from sempre.ipc.messages.worker import (
    CallMethod,
    CallMethodReply,
    DraftRequest,
    ExecuteStep,
    LoadModel,
    ModelLoaded,
    NewRequest,
    SampledTokens,
    ScheduledRequest,
    ShutdownWorker,
    StartServing,
    StepCosts,
    StepResult,
    WorkerCommand,
    WorkerEvent,
    WorkerFailed,
    WorkerHello,
    WorkerReady,
)
