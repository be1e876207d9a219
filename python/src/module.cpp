// polybit._C: load backend libraries, list them, and call an op with torch tensors, without linking torch or knowing
// any op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <deque>
#include <memory>

#include "parallel.h"
#include "registry.h"

namespace py = pybind11;

namespace {

// What the binder uses of torch, set once by polybit.ops.
struct Torch {
  // torch.Tensor.__dlpack_c_exchange_api__ (DLPack 1.3); torch before 2.10 has only the capsules of to_dlpack.
  int (*describe)(void *, DLTensor *) = nullptr;
  PyObject *to_dlpack = nullptr;
  PyObject *empty_bytes = nullptr;  // (count, like) -> uint8 tensor on the device of `like`
};
Torch torch_api;
PyObject *unsupported_error = nullptr;
PyObject *contiguous_name = nullptr;
bool deterministic = false;  // of every call; set once by polybit.backends

// One kernel of one backend, bound to what a call needs to know.
struct Bound {
  pb::Kernel kernel;
  std::string op, backend, kinds;
  bool host;
};

union Slot {
  const void *pointer;
  int64_t integer;
  double real;
};
static_assert(sizeof(Slot) == 8, "every field of an argument struct is eight bytes");

// The arguments of one call, and all that must live as long as it.
class Call {
 public:
  explicit Call(const Bound &bound) : bound_(bound) {}
  ~Call() {
    for (PyObject *object : owned_) Py_DECREF(object);
  }
  Call(const Call &) = delete;

  // False with a Python error set.
  bool fill(PyObject *args, PyObject *outs);
  pb_status run(void *stream, std::string &reason);

 private:
  bool tensor(PyObject *object, char kind, const DLTensor **out);
  bool list(PyObject *object, char kind);
  bool fail(PyObject *type, const std::string &message) const {
    PyErr_SetString(type, (bound_.op + ": " + message).c_str());
    return false;
  }

  const Bound &bound_;
  std::vector<Slot> slots_;
  std::deque<DLTensor> tensors_;  // a deque: their addresses stay
  std::deque<std::vector<DLTensor *>> pointers_;
  std::deque<pb_tensor_list> lists_;
  std::vector<PyObject *> owned_;
  PyObject *first_ = nullptr;
  DLDevice device_{};
};

bool is_contiguous(const DLTensor &tensor) {
  if (!tensor.strides) return true;
  int64_t expected = 1;
  bool dense = true;
  for (int i = tensor.ndim - 1; i >= 0; i--) {
    if (tensor.shape[i] == 0) return true;
    if (tensor.shape[i] != 1) {
      dense = dense && tensor.strides[i] == expected;
      expected *= tensor.shape[i];
    }
  }
  return dense;
}

bool describe(PyObject *object, DLTensor &out, std::vector<PyObject *> &owned) {
  if (torch_api.describe) return torch_api.describe(object, &out) == 0;
  PyObject *capsule = PyObject_CallOneArg(torch_api.to_dlpack, object);
  if (!capsule) return false;
  owned.push_back(capsule);  // never consumed: its own destructor frees the description
  auto *managed = static_cast<DLManagedTensor *>(PyCapsule_GetPointer(capsule, "dltensor"));
  if (!managed) return false;
  out = managed->dl_tensor;
  return true;
}

bool Call::tensor(PyObject *object, char kind, const DLTensor **out) {
  tensors_.emplace_back();
  DLTensor &dl = tensors_.back();
  if (!describe(object, dl, owned_))
    return PyErr_Occurred() ? false : fail(PyExc_TypeError, "an argument is no tensor");
  if (!is_contiguous(dl)) {
    if (kind == 'm' || kind == 'M') return fail(unsupported_error, "a tensor changed in place must be contiguous");
    PyObject *copy = PyObject_CallMethodNoArgs(object, contiguous_name);
    if (!copy) return false;
    owned_.push_back(copy);
    if (!describe(copy, dl, owned_)) return false;
  }
  if (!first_) {
    first_ = object;
    device_ = dl.device;
  } else if (kind != 'o' &&
             (dl.device.device_type != device_.device_type || dl.device.device_id != device_.device_id)) {
    return fail(PyExc_ValueError, "all tensors must be on one device");
  }
  dl.data = static_cast<char *>(dl.data) + dl.byte_offset;
  dl.byte_offset = 0;
  dl.strides = nullptr;
  *out = &dl;
  return true;
}

bool Call::list(PyObject *object, char kind) {
  PyObject *items = PySequence_Fast(object, "a list of tensors is wanted");
  if (!items) return false;
  owned_.push_back(items);
  pointers_.emplace_back();
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items); i++) {
    const DLTensor *dl = nullptr;
    if (!tensor(PySequence_Fast_GET_ITEM(items, i), kind, &dl)) return false;
    pointers_.back().push_back(const_cast<DLTensor *>(dl));
  }
  lists_.push_back({static_cast<int64_t>(pointers_.back().size()), pointers_.back().data()});
  slots_.push_back(Slot{&lists_.back()});
  return true;
}

bool Call::fill(PyObject *args, PyObject *outs) {
  Py_ssize_t next_arg = 0, next_out = 0;
  for (char kind : bound_.kinds) {
    if (kind == 'd' || kind == 's') {
      next_arg++;
      continue;
    }
    PyObject *from = kind == 'o' ? outs : args;
    Py_ssize_t &next = kind == 'o' ? next_out : next_arg;
    if (next >= PyTuple_GET_SIZE(from)) return fail(PyExc_TypeError, "too few arguments");
    PyObject *object = PyTuple_GET_ITEM(from, next++);
    Slot slot{nullptr};
    switch (kind) {
      case 'I':
      case 'M':
        if (!list(object, kind)) return false;
        continue;
      case 'n':
        slot.integer = PyLong_AsLongLong(object);
        break;
      case 'f':
        slot.real = PyFloat_AsDouble(object);
        break;
      default:
        if (kind == '?' && object == Py_None) break;
        const DLTensor *dl = nullptr;
        if (!tensor(object, kind, &dl)) return false;
        slot.pointer = dl;
    }
    if (PyErr_Occurred()) return false;
    slots_.push_back(slot);
  }
  return true;
}

pb_status Call::run(void *stream, std::string &reason) {
  char error[512] = "";
  pb_context context{};
  context.size = sizeof context;
  context.stream = stream;
  context.device_index = device_.device_id;
  context.error = error;
  context.error_size = sizeof error;
  context.deterministic = deterministic;
  if (bound_.host) {
    context.thread_count = static_cast<uint64_t>(pb::thread_count());
    context.parallel_for = pb::parallel_for;
  }
  for (;;) {
    pb_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = bound_.kernel(&context, slots_.data());
    Py_END_ALLOW_THREADS;
    reason = error;
    if (status != PB_SCRATCH) return status;
    if (context.scratch_needed <= context.scratch_size) {
      reason = "asked for scratch that it already had";
      return PB_ERROR;
    }
    PyObject *bytes = PyObject_CallFunction(torch_api.empty_bytes, "KO",
                                            static_cast<unsigned long long>(context.scratch_needed), first_);
    if (!bytes) throw py::error_already_set();
    owned_.push_back(bytes);
    DLTensor dl;
    if (!describe(bytes, dl, owned_)) throw py::error_already_set();
    context.scratch = static_cast<char *>(dl.data) + dl.byte_offset;
    context.scratch_size = context.scratch_needed;
  }
}

// (stream, args, outs) -> None. A plain C function: pybind11's own dispatch would cost more than the binding.
PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  const auto *bound = static_cast<const Bound *>(PyCapsule_GetPointer(self, "polybit.Bound"));
  if (!bound) return nullptr;
  if (count != 3 || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "a kernel takes (stream, args, outs)");
    return nullptr;
  }
  try {
    void *stream = PyLong_AsVoidPtr(args[0]);
    if (PyErr_Occurred()) return nullptr;
    Call arguments(*bound);
    if (!arguments.fill(args[1], args[2])) return nullptr;
    std::string reason;
    const pb_status status = arguments.run(stream, reason);
    if (status == PB_OK) Py_RETURN_NONE;
    PyObject *type = status == PB_UNSUPPORTED ? unsupported_error
                     : status == PB_BAD_INDEX ? PyExc_IndexError
                                              : PyExc_RuntimeError;
    PyErr_SetString(
        type, (bound->op + " (" + bound->backend + "): " + (reason.empty() ? "no reason given" : reason)).c_str());
  } catch (py::error_already_set &error) {
    error.restore();
  } catch (const std::exception &error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}
PyMethodDef call_method = {"kernel", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
                           nullptr};

py::object bind(const pb::Backend &backend, size_t op) {
  if (!backend.kernels[op]) return py::none();
  const pb::Op &row = pb::op_table()[op];
  auto *bound = new Bound{backend.kernels[op], row.name, backend.name, row.kinds, backend.device_type == kDLCPU};
  py::capsule self(bound, "polybit.Bound", [](PyObject *capsule) {
    delete static_cast<Bound *>(PyCapsule_GetPointer(capsule, "polybit.Bound"));
  });
  return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&call_method, self.ptr(), nullptr));
}

// [(name, DLPack device type, usable, reason, {op: kernel})], best first. A library is never unloaded.
py::list load(const std::string &path) {
  py::list result;
  for (const pb::Backend &backend : pb::load(path)) {
    py::dict kernels;
    for (size_t i = 0; i < pb::op_table().size(); i++) {
      py::object kernel = backend.usable ? bind(backend, i) : py::none();
      if (!kernel.is_none()) kernels[pb::op_table()[i].name] = kernel;
    }
    result.append(py::make_tuple(backend.name, backend.device_type, backend.usable, backend.reason, kernels));
  }
  return result;
}

void set_torch(py::object exchange_api, py::object to_dlpack, py::object empty_bytes) {
  torch_api.describe = nullptr;
  if (!exchange_api.is_none()) {
    auto *api = static_cast<const DLPackExchangeAPI *>(PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->header.version.major == DLPACK_MAJOR_VERSION) torch_api.describe = api->dltensor_from_py_object_no_sync;
  }
  torch_api.to_dlpack = to_dlpack.release().ptr();
  torch_api.empty_bytes = empty_bytes.release().ptr();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Load polybit backends and call their ops.";
  unsupported_error = PyErr_NewException("polybit._C.Unsupported", PyExc_RuntimeError, nullptr);
  contiguous_name = PyUnicode_InternFromString("contiguous");
  m.attr("Unsupported") = py::reinterpret_borrow<py::object>(unsupported_error);
  m.attr("abi") = static_cast<uint64_t>(PB_ABI);
  m.def("set_torch", &set_torch, py::arg("exchange_api"), py::arg("to_dlpack"), py::arg("empty_bytes"));
  m.def("load", &load, py::arg("path"));
  m.def("openmp_library", &pb::openmp_library);
  m.def("thread_count", &pb::thread_count);
  m.def("set_deterministic", [](bool on) { deterministic = on; }, py::arg("on"));
}
