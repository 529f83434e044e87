"""A worker as benchmarks/gpu_check/worker.py is, on a device without torch: ``python fake_worker.py SOURCE DEVICE``."""

import sys
import types

fake = types.ModuleType("benchmarks.gpu_check.device")


class Fake:
    kind, name = "cpu", "a fake"

    def healthy(self):
        return True

    def synchronize(self):
        pass

    def empty_cache(self):
        pass


fake.Device, fake.open_device = Fake, lambda kind: Fake()
sys.modules["benchmarks.gpu_check.device"] = fake

from benchmarks.gpu_check.worker import main  # noqa: E402

sys.exit(main())
