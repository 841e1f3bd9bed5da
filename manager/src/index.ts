export { ManagerError, type ManagerErrorCode } from './error.js';
