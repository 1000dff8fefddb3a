"""A real ``Trainer.fit`` that stands still between steps, so that several fits take turns in one process."""

import threading

import torch
from lightning.pytorch.callbacks import Callback


class HeldFit(Callback):
    """A fit that goes on by some steps with each call of :meth:`advance`, and stands still in between.

    A fit is a call that can't be left and entered again without losing the optimizer's state and paying for its start,
    so each has a thread of its own. Exactly one thread runs at any time, as coroutines do, on all ranks the same one.

    Subclasses run the trainer in :meth:`fit`, with themselves as its first callback, and call :meth:`stand` in a hook.
    """

    def __init__(self) -> None:
        self._may_go, self._stands = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._cuda_index = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def fit(self) -> None:
        """Build the trainer and the model, and train."""
        raise NotImplementedError

    def advance(self) -> None:
        """Start the fit; or run it to where it stands next, or to its end. Raises what the fit raised."""
        self._stands.clear()
        self._may_go.set()
        self._stands.wait()
        if self._failure is not None:
            raise self._failure

    def stand(self) -> None:
        """Stand still until the next call of :meth:`advance`. Called by the fit's thread."""
        self._may_go.clear()
        self._stands.set()
        self._may_go.wait()

    def _run(self) -> None:
        self._may_go.wait()
        try:
            torch.set_num_threads(1)
            if self._cuda_index is not None:
                torch.cuda.set_device(self._cuda_index)  # a new thread begins with device 0
            self.fit()
        except BaseException as failure:
            self._failure = failure
        finally:
            self._stands.set()
