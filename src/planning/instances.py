"""The instances that a plan knows: the one table of them.

Sources, all public:
    [trn2]      Neuron documentation, Amazon EC2 Trn2 architecture: 16 chips, 2,048 GiB of host memory, 1,536 GiB of
                device memory on trn2.48xlarge and trn2u.48xlarge
    [chip2]     the same, Trainium2: 96 GiB a chip, eight NeuronCores; logical NeuronCore configuration: 24 GB of memory
                that two NeuronCores share
    [chip3]     the same, Trainium3: 144 GiB a chip, eight NeuronCores; Trn3 architecture: 16 chips in a server of a
                Gen1 UltraServer
    [contrib]   NxDI's contrib READMEs, for example contrib/models/chandra: trn2.3xlarge has four logical cores at LNC 2
    [karpenter] Karpenter's reference of EC2 instance types: 7,600 GB of local NVMe on trn2.48xlarge
Host memory and NVMe are None where none of these names them.
"""

from dataclasses import dataclass

from ..errors import ConfigError

GB, GIB = 10**9, 2**30
CORES_PER_CHIP = 8
DEFAULT_LNC = 2


@dataclass(frozen=True)
class Instance:
    """core_bytes: device memory that two NeuronCores share, so that of a logical core at LNC 2. The documentation calls
    it 24 GB and a chip of four of them 96 GiB; the smaller reading is taken. host_bytes, nvme_bytes: None if unknown.
    """

    name: str
    chips: int
    core_bytes: int
    host_bytes: int | None
    nvme_bytes: int | None

    def logical_cores(self, lnc: int) -> int:
        """Logical cores where `lnc` NeuronCores make one."""
        return self.chips * CORES_PER_CHIP // lnc

    def rank_bytes(self, lnc: int) -> int:
        """Device memory of one logical core."""
        return self.core_bytes * lnc // 2


INSTANCES = {
    instance.name: instance
    for instance in (
        Instance("trn2.48xlarge", 16, 24 * GB, 2048 * GIB, 7600 * GB),  # [trn2], [chip2], [karpenter]
        Instance("trn2u.48xlarge", 16, 24 * GB, 2048 * GIB, None),  # [trn2], [chip2]
        Instance("trn2.3xlarge", 1, 24 * GB, None, None),  # [contrib], [chip2]
        Instance("trn3-gen1-server", 16, 36 * GB, None, None),  # [chip3]
    )
}
DEFAULT_INSTANCE = "trn2.48xlarge"


def instance_of(name: str) -> Instance:
    """The row of a name. Raises ConfigError for another name."""
    if name not in INSTANCES:
        raise ConfigError(f"instance {name!r} is not known; use {', '.join(INSTANCES)}")
    return INSTANCES[name]
