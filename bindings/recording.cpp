// tilewright._C.Recording
#include "recording.h"

#include "check.h"

namespace py = pybind11;

namespace {

void start(tw::Recording& recording) {
  TW_CHECK(!tw::current_recording(), "recording: this thread records already");
  tw::current_recording() = &recording;
}

void stop(tw::Recording& recording) {
  TW_CHECK(tw::current_recording() == &recording, "recording: this thread does not record into this one");
  tw::current_recording() = nullptr;
}

void run(const tw::Recording& recording) {
  TW_CHECK(!tw::current_recording(), "recording: a recording cannot be part of another");
  recording.run();
}

}  // namespace

void register_recording(py::module_& m) {
  py::class_<tw::Recording>(m, "Recording")
      .def(py::init<>())
      .def("start", &start)
      .def("stop", &stop)
      .def("__len__", &tw::Recording::size)
      .def("__call__", &run);
}
