# find_package(lcnn CONFIG PATHS this/folder) gives the target lcnn::lcnn.
if(NOT TARGET lcnn::lcnn)
  add_library(lcnn::lcnn SHARED IMPORTED)
  set_target_properties(lcnn::lcnn PROPERTIES
    IMPORTED_LOCATION "${CMAKE_CURRENT_LIST_DIR}/liblcnn.so"
    IMPORTED_SONAME "liblcnn.so"
    INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}")
endif()
