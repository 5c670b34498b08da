"""Reads images with a SavedModel through TensorFlow's C API alone, without TensorFlow's Python.

    python c_api.py LIBRARY SAVED_MODEL IMAGES TEXT CONFIDENCE FILE...

The third to fifth are the names of operations. Prints [texts, confidences] as JSON.
"""

import ctypes
import json
import sys
from pathlib import Path

STRING, STRING_SIZE = 7, 24  # TF_STRING, and sizeof(TF_TString)
pointer = ctypes.c_void_p


class Output(ctypes.Structure):
    """TF_Output"""
    _fields_ = [("operation", pointer), ("index", ctypes.c_int)]


def main(library, folder, images, text, confidence, *paths):
    api = ctypes.CDLL(library)
    for name in ("NewStatus", "NewGraph", "NewSessionOptions", "LoadSessionFromSavedModel", "GraphOperationByName",
                 "AllocateTensor", "TensorData", "StringGetDataPointer"):
        getattr(api, f"TF_{name}").restype = pointer
    api.TF_Message.restype, api.TF_StringGetSize.restype = ctypes.c_char_p, ctypes.c_size_t
    status, graph = pointer(api.TF_NewStatus()), pointer(api.TF_NewGraph())

    def check():
        if api.TF_GetCode(status):
            sys.exit(api.TF_Message(status).decode())

    def output(name):
        operation = api.TF_GraphOperationByName(graph, name.encode()) or sys.exit(f"no operation {name}")
        return Output(operation, 0)

    def strings(tensor):
        begin = api.TF_TensorData(tensor)
        return [pointer(begin + STRING_SIZE * number) for number in range(len(paths))]

    session = pointer(api.TF_LoadSessionFromSavedModel(
        pointer(api.TF_NewSessionOptions()), None, folder.encode(), (ctypes.c_char_p * 1)(b"serve"), 1, graph, None,
        status))
    check()
    count = len(paths)
    files = pointer(api.TF_AllocateTensor(STRING, (ctypes.c_int64 * 1)(count), 1,
                                          ctypes.c_size_t(STRING_SIZE * count)))
    for place, path in zip(strings(files), paths):
        data = Path(path).read_bytes()
        api.TF_StringInit(place)
        api.TF_StringCopy(place, data, ctypes.c_size_t(len(data)))
    results = (pointer * 2)()
    api.TF_SessionRun(session, None, (Output * 1)(output(images)), (pointer * 1)(files), 1,
                      (Output * 2)(output(text), output(confidence)), results, 2, None, 0, None, status)
    check()
    texts = [ctypes.string_at(api.TF_StringGetDataPointer(place), api.TF_StringGetSize(place)).decode()
             for place in strings(pointer(results[0]))]
    confidences = ctypes.cast(api.TF_TensorData(pointer(results[1])), ctypes.POINTER(ctypes.c_float))
    print(json.dumps([texts, confidences[:count]]))


main(*sys.argv[1:])
